"""How a batch is given to a step: one table of steps and batches, through every function that calls a step."""

from __future__ import annotations

import functools
import textwrap
from collections import namedtuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

import mlx_tune as mt
from mlx_tune.graphs.tracing.trace import taking

pytestmark = pytest.mark.usefixtures("quick_garbage")

Pair = namedtuple("Pair", "x y")


class Training:
    """A model, and the one true step on it, which every case of the table calls in its own way."""

    def __init__(self):
        mx.random.seed(0)
        self.model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3)))
        self.optimizer = optim.SGD(0.01)
        self.state = (self.model, self.optimizer)
        self.gradients = nn.value_and_grad(self.model, self.loss)
        mx.eval(self.model.state)

    def loss(self, x, y):
        return nn.losses.cross_entropy(self.model(x), y).mean()

    def train(self, x, y):
        value, gradients = self.gradients(x, y)
        self.optimizer.update(self.model, gradients)
        return value


def batch_of(n):
    return mx.random.normal((n, 8), key=mx.random.key(1)), mx.arange(n) % 8


def as_dict(n):
    return dict(zip("xy", batch_of(n), strict=True))


def through(function):
    """A decorator that says nothing of its arguments."""

    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def with_scale(function):
    """A decorator that passes for a function of three arguments and takes one."""

    @functools.wraps(function)
    def wrapper(batch):
        return function(1.0, *batch)

    return wrapper


class Object:
    def __init__(self, train):
        self.train = train

    def __call__(self, x, y):
        return self.train(x, y)

    def method(self, x, *, y):
        return self.train(x, y)


def two(train):
    return lambda x, y: train(x, y)


def one(train):
    return lambda batch: train(*batch)


#: name: the step, made of the true one; and the batch.
CASES = {
    "two arguments, a tuple": (two, batch_of),
    "two arguments, a list": (two, lambda n: list(batch_of(n))),
    "two arguments, a named tuple": (two, lambda n: Pair(*batch_of(n))),
    "two arguments, a dictionary": (two, as_dict),
    "keyword-only arguments": (lambda train: lambda *, x, y: train(x, y), as_dict),
    "a keyword-only argument among others": (lambda train: lambda x, *, y: train(x, y), as_dict),
    "a default that the batch holds": (lambda train: lambda x, y=None: train(x, y), batch_of),
    "a default that the batch does not hold": (lambda train: lambda x, y, scale=1.0: scale * train(x, y), batch_of),
    "a default by name": (lambda train: lambda x=None, y=None, scale=1.0: scale * train(x, y), as_dict),
    "a default after a whole batch": (lambda train: lambda batch, scale=1.0: scale * train(*batch), batch_of),
    "a default after a whole dictionary": (lambda train: lambda batch, scale=1.0: scale * train(**batch), as_dict),
    "any number of arguments": (lambda train: lambda *args: train(*args), batch_of),
    "any names": (lambda train: lambda **batch: train(batch["x"], batch["y"]), as_dict),
    "one argument, a tuple": (one, batch_of),
    "one argument, a named tuple": (lambda train: lambda batch: train(batch.x, batch.y), lambda n: Pair(*batch_of(n))),
    "one argument, a dictionary": (lambda train: lambda batch: train(**batch), as_dict),
    "one argument that the only item fits": (
        lambda train: lambda x: train(x, mx.arange(len(x)) % 8),
        lambda n: batch_of(n)[:1],
    ),
    "one argument, a dictionary that holds its name": (
        lambda train: lambda x: train(x, mx.arange(len(x)) % 8),
        lambda n: {"x": batch_of(n)[0]},
    ),
    "one argument, an array": (lambda train: lambda x: train(x, mx.arange(len(x)) % 8), lambda n: batch_of(n)[0]),
    "nested": (lambda train: lambda x, more: train(x, more["y"]), lambda n: (batch_of(n)[0], {"y": batch_of(n)[1]})),
    "a decorator that hides two arguments": (lambda train: through(two(train)), batch_of),
    "a decorator that hides two names": (lambda train: through(two(train)), as_dict),
    "a decorator that hides one argument": (lambda train: through(one(train)), batch_of),
    "a decorator that adds an argument": (
        lambda train: with_scale(lambda scale, x, y: scale * train(x, y)),
        batch_of,
    ),
    "a method": (lambda train: Object(train).method, as_dict),
    "an object that can be called": (Object, batch_of),
    "partial": (lambda train: functools.partial(lambda scale, x, y: scale * train(x, y), 1.0), batch_of),
    "partial by name": (lambda train: functools.partial(lambda x, y, scale: scale * train(x, y), scale=1.0), as_dict),
}

FORMS = {
    "plain": lambda step, held: step,
    "compiled": lambda step, held: mx.compile(step, inputs=held, outputs=held),
    "compiled twice": lambda step, held: mx.compile(
        mx.compile(step, inputs=held, outputs=held), inputs=held, outputs=held
    ),
}


def made(name, form="plain"):
    training = Training()
    training.optimizer.init(training.model.trainable_parameters())
    step, make_batch = CASES[name]
    held = [training.model.state, training.optimizer.state]
    return training, FORMS[form](step(training.train), held), make_batch


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_true_step(name, form):
    training, step, make_batch = made(name, form)
    expected = Training().train(*batch_of(4)).item()
    batch = make_batch(4)
    before = [np.array(a) for a in map(mx.array, mx.random.state)]
    given = taking(step, [batch], training.state)
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, mx.random.state, strict=True))
    assert given(batch).item() == pytest.approx(expected, rel=1e-5)
    assert taking(given, [batch], training.state) is given  # settled once


OPTIONS = {"budget": "20MB", "progress": False}
FUNCTIONS = {
    "estimate_memory": lambda t, step, make: mt.estimate_memory(step, make(4), state=t.state),
    "tightest_limit": lambda t, step, make: mt.tightest_limit(step, make(4), state=t.state, repeats=1, progress=False),
    "autobatch": lambda t, step, make: mt.autobatch(step, make, max_batch=8, state=t.state, **OPTIONS),
    "autobatch_by_length": lambda t, step, make: mt.autobatch_by_length(
        step, lambda n, length: make(n), [3], max_batch=8, state=t.state, **OPTIONS
    ),
    "plan_checkpoints": lambda t, step, make: mt.plan_checkpoints(
        t.model, step, make, batch_size=4, state=t.state, steps=1, **OPTIONS
    ),
    "autofit": lambda t, step, make: mt.autofit(t.model, step, make, max_batch=4, state=t.state, steps=1, **OPTIONS),
}


QUICK = ["estimate_memory", "plan_checkpoints"]
#: One of each sort, for functions that measure: all of them hand over batches in the same place.
SORTS = [
    "two arguments, a tuple",
    "two arguments, a dictionary",
    "keyword-only arguments",
    "a default after a whole batch",
    "any number of arguments",
    "one argument, a tuple",
    "one argument, a dictionary that holds its name",
    "a decorator that hides two arguments",
]
EVERYWHERE = [(function, name) for function in FUNCTIONS for name in (CASES if function in QUICK else SORTS)]


@pytest.mark.parametrize(("function", "name"), EVERYWHERE)
def test_every_function_that_calls_a_step_takes_it(name, function):
    training, step, make_batch = made(name)
    before = [np.array(array) for _, array in nn.utils.tree_flatten(training.model.parameters())]
    FUNCTIONS[function](training, step, make_batch)
    after = [np.array(array) for _, array in nn.utils.tree_flatten(training.model.parameters())]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("form", ["compiled", "compiled twice"])
@pytest.mark.parametrize("name", ["two arguments, a tuple", "keyword-only arguments", "an object that can be called"])
def test_every_function_takes_compiled_steps(name, form, function):
    FUNCTIONS[function](*made(name, form))


@pytest.mark.parametrize("name", [name for name in CASES if "decorator that adds" not in name])
def test_verify_checkpoint_takes_the_same(name):
    training = Training()
    loss, make_batch = CASES[name]
    assert mt.verify_checkpoint(training.model, loss(training.loss), make_batch(4)).ok


@pytest.mark.parametrize(
    ("loss", "make_batch"),
    [
        (lambda model, x, y: nn.losses.cross_entropy(model(x), y).mean(), batch_of),
        (lambda model, x, y: nn.losses.cross_entropy(model(x), y).mean(), as_dict),
        (lambda model, *, x, y: nn.losses.cross_entropy(model(x), y).mean(), as_dict),
        (lambda model, batch: nn.losses.cross_entropy(model(batch[0]), batch[1]).mean(), batch_of),
        (lambda model, **batch: nn.losses.cross_entropy(model(batch["x"]), batch["y"]).mean(), as_dict),
    ],
)
def test_verify_checkpoint_puts_the_model_before_a_batch(loss, make_batch):
    assert mt.verify_checkpoint(Training().model, loss, make_batch(4)).ok


@pytest.mark.parametrize("signature", ["x, y", "*, x, y", "*args", "x, y=None", "batch"])
def test_isolated_trials_take_the_same(tmp_path, monkeypatch, signature):
    body = {"*args": "*args", "batch": "*batch"}.get(signature, "x, y")
    batch = "{'x': x, 'y': y}" if "*," in signature else "x, y"
    (tmp_path / "isolated_step.py").write_text(
        textwrap.dedent(f"""
        import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim

        def build():
            model, optimizer = nn.Linear(8, 8), optim.SGD(0.01)
            grad = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y).mean())

            def train(x, y):
                loss, gradients = grad(x, y)
                optimizer.update(model, gradients)
                return loss

            def step({signature}):
                return train({body})

            def make_batch(n):
                x, y = mx.ones((n, 8)), mx.zeros((n,), dtype=mx.int32)
                return {batch}

            return step, make_batch, (model, optimizer)
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = mt.autobatch(isolate="isolated_step:build", max_batch=2, min_batch=2, **OPTIONS)
    assert found.batch_size == 2


@pytest.mark.parametrize("function", ["estimate_memory", "autobatch", "plan_checkpoints", "autofit"])
def test_a_type_error_of_the_step_itself_is_the_users_to_see(function):
    with pytest.raises(TypeError, match="has no len") as raised:
        FUNCTIONS[function](Training(), lambda x, y: x * len(3), batch_of)
    assert not any("was tried as" in note for note in raised.value.__notes__)


def test_where_two_ways_were_tried_the_error_of_the_one_that_got_furthest_is_raised():
    def train(x, y):
        raise TypeError("my own mistake")

    with pytest.raises(TypeError, match="my own mistake") as raised:
        taking(through(train), [batch_of(2)])
    assert any("step(batch) and as step(*batch)" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("step", "batch", "words"),
    [
        (lambda x, y, z: x, batch_of(2), [r"\(x, y, z\)", "tuple of 2", r"step\(batch\), step\(\*batch\)"]),
        (lambda x, z: x, as_dict(2), [r"\(x, z\)", r"dict of \['x', 'y'\]", r"step\(\*\*batch\)"]),
        (mx.compile(lambda: mx.array(1.0)), batch_of(2), [r"\(\)"]),
    ],
)
def test_a_batch_that_fits_no_way_is_refused_with_both_sides_named(step, batch, words):
    for word in words:
        with pytest.raises(mt.InvalidArgumentError, match=word):
            mt.estimate_memory(step, batch)


def test_a_step_that_evaluates_is_given_what_its_signature_allows():
    seen = []

    def step(*batch):
        x, y = batch
        seen.append(float((x * y[:, None]).sum().item()))
        return x.sum()

    batch = batch_of(2)
    taking(step, [batch])(batch)
    assert len(seen) == 1  # in the trace it did not get that far


@pytest.mark.parametrize(("inner", "expected"), [(lambda x, y: "spread", "spread"), (lambda batch: "whole", "whole")])
def test_where_no_trace_tells_the_function_inside_a_decorator_does(inner, expected):
    @functools.wraps(inner)
    def step(*args):
        mx.eval(args)  # before anything says how many there should be
        return inner(*args)

    given = taking(step, [batch_of(2)])
    assert given(batch_of(2)) == expected


def test_functions_without_a_signature_are_tried(tmp_path):
    path = str(tmp_path / "step.mlxfn")
    mx.export_function(path, lambda x, y: (x * y).sum(), mx.ones(3), mx.ones(3))
    exported = mx.import_function(path)
    batch = (mx.array([1.0, 2.0, 3.0]), mx.ones(3))
    assert taking(exported, [batch])(batch)[0].item() == 6.0
    assert mt.estimate_memory(exported, batch).floor_bytes > 0
