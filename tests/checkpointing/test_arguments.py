"""Arguments of the wrong kind: an error that names the argument and what it was given, and a model as it was."""

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune as mt
import mlx_tune.checkpointing.planning.plan as planning
from mlx_tune.checkpointing import find_blocks

NUMBERS = [3, 0, -1, 2.5, float("nan"), True, None]
OBJECTS = [object(), [1], {"a": 1}, ("a", 3), b"text", mx.ones(2)]


def make_model():
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))


def plan(model, **changed):
    def step(x):
        return nn.value_and_grad(model, lambda x: model(x).sum())(x)

    settings = {"step": step, "make_batch": lambda n: mx.ones((n, 4)), "batch_size": 2, "budget": "1GB", **changed}
    return mt.plan_checkpoints(model, settings.pop("step"), settings.pop("make_batch"), progress=False, **settings)


def two_arguments(a, b, c):
    """One more than a selection is asked with."""


MODULES = [*NUMBERS, *OBJECTS, "a model", make_model]
FUNCTIONS = [*NUMBERS, *OBJECTS, "a function"]
NAMES = [*NUMBERS, object(), {"a": 1}, [1], (None,), b"text", "product", make_model, make_model()]
CALLS = {
    "checkpoint(block)": (lambda _, value: mt.checkpoint(value), [*NUMBERS, *OBJECTS, "block", nn.Linear]),
    "checkpoint(keep)": (lambda model, value: mt.checkpoint(model.layers[0], keep=value), NAMES),
    "checkpoint_blocks(model)": (lambda _, value: mt.checkpoint_blocks(value), MODULES),
    "checkpoint_blocks(every)": (
        lambda model, value: mt.checkpoint_blocks(model, every=value),
        [0, -1, 2.5, float("nan"), True, None, "2", *OBJECTS],
    ),
    "checkpoint_blocks(select)": (
        lambda model, value: mt.checkpoint_blocks(model, select=value),
        [3, 0, 2.5, True, *OBJECTS, two_arguments, make_model()],
    ),
    "checkpoint_blocks(keep)": (lambda model, value: mt.checkpoint_blocks(model, keep=value), NAMES),
    "find_blocks(model)": (lambda _, value: find_blocks(value), MODULES),
    "uncheckpoint(model)": (lambda _, value: mt.uncheckpoint(value), MODULES),
    "keep(array)": (lambda _, value: mt.keep(value, "name"), [*NUMBERS, *OBJECTS[:-1], "array"]),
    "keep(name)": (lambda _, value: mt.keep(mx.ones(2), value), [*NUMBERS, *OBJECTS]),
    "verify_checkpoint(model)": (lambda _, value: mt.verify_checkpoint(value, lambda x: x.sum(), mx.ones(2)), MODULES),
    "verify_checkpoint(loss)": (lambda model, value: mt.verify_checkpoint(model, value, mx.ones((2, 4))), FUNCTIONS),
    "verify_checkpoint(loss's result)": (
        lambda model, value: mt.verify_checkpoint(model, lambda model, x: value, mx.ones((2, 4))),
        [*NUMBERS, *OBJECTS, (), (mx.ones(1),)],
    ),
    "plan_checkpoints(model)": (lambda _, value: plan(value), MODULES),
    "plan_checkpoints(step)": (lambda model, value: plan(model, step=value), FUNCTIONS),
    "plan_checkpoints(make_batch)": (lambda model, value: plan(model, make_batch=value), FUNCTIONS),
    "plan_checkpoints(batch_size)": (
        lambda model, value: plan(model, batch_size=value),
        [0, -1, 2.5, float("nan"), True, None, "2", *OBJECTS],
    ),
    "plan_checkpoints(budget)": (
        lambda model, value: plan(model, budget=value),
        [-1, float("nan"), "much", *OBJECTS[:-1]],
    ),
    "plan_checkpoints(select)": (lambda model, value: plan(model, select=value), [3, True, *OBJECTS, two_arguments]),
    "plan_checkpoints(steps)": (lambda model, value: plan(model, steps=value), [0, -1, 2.5, True, None, "2"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments(name):
    call, values = CALLS[name]
    model = make_model()
    mx.eval(model.parameters())
    for value in values:
        with pytest.raises(mt.InvalidArgumentError) as caught:
            call(model, value)
        assert str(caught.value).endswith((".", "]")), caught.value
        assert not any(map(mt.is_checkpointed, model.modules())), value


@pytest.mark.parametrize("argument", ["model", "step", "make_batch", "batch_size", "budget", "select", "steps"])
def test_a_plan_refuses_before_it_sets_out(monkeypatch, argument):
    """With large models, putting the state aside takes long."""
    for name in ("Snapshot", "quick_collections", "Survey"):
        monkeypatch.setattr(planning, name, lambda *args, name=name, **options: pytest.fail(f"came to {name}"))
    call, values = CALLS[f"plan_checkpoints({argument})"]
    for value in values:
        with pytest.raises(mt.InvalidArgumentError):
            call(make_model(), value)


class Unmade(nn.Module):
    """Forgets `super().__init__()`; MLX calls it all the same."""

    def __init__(self):
        self.inner = nn.Linear(4, 4)

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("call", "path"),
    [
        (lambda model: mt.checkpoint(model.layers[1]), ""),
        (lambda model: mt.checkpoint_blocks(model, select="layers.*"), " at 'layers.1'"),
        (lambda model: mt.checkpoint_blocks(model), " at 'layers.1'"),
        (lambda model: mt.verify_checkpoint(model, lambda model, x: model(x).sum(), mx.ones((2, 4))), " at 'layers.1'"),
    ],
)
def test_a_block_without_its_base_s_init_is_named(call, path):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), Unmade(), nn.Sequential(nn.Linear(4, 4)))
    assert model(mx.ones((2, 4))).shape == (2, 4)
    with pytest.raises(mt.CheckpointError, match=rf"Unmade{path} was made without.*super\(\).__init__\(\)"):
        call(model)
    assert not any(map(mt.is_checkpointed, model.modules()))
