"""What a function leaves in the code around it is found by tracing and by checkpointing alike."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator

import left_behind
import mlx.core as mx
import mlx.nn as nn
import pytest
from left_behind import CASES, forget
from mlx.utils import tree_flatten

import mlx_tune as mt

X = mx.array([0.5, -1.0, 2.0])


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    forget()
    yield
    forget()


def arrays(held: object) -> list[list[float]]:
    """The values that are held; evaluating a dead array fails."""
    return [leaf.tolist() for _, leaf in tree_flatten([held]) if isinstance(leaf, mx.array)]


@pytest.mark.parametrize("name", CASES)
def test_a_trace_names_it_and_takes_it_out(name: str) -> None:
    step, held = CASES[name]()
    before = repr(held())
    with pytest.raises(mt.MlxTuneError, match="leaves arrays outside of what it was said to change"):
        mt.estimate_memory(step, X)
    assert repr(held()) == before
    assert arrays(held()) == []


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_leaves_what_the_plain_function_leaves(name: str) -> None:
    left = []
    for wrap in (lambda step: step, mt.checkpoint):
        forget()
        step, held = CASES[name]()
        wrapped = wrap(step)
        value, gradient = mx.value_and_grad(lambda x, wrapped=wrapped: wrapped(x).square())(X)
        mx.eval(value, gradient)
        left.append((arrays(held()), gradient.tolist()))
    assert left[0] == left[1]
    assert left[0][0] != []


@pytest.mark.parametrize("name", ["a module in an attribute", "an attribute of the function", "far below"])
def test_the_place_is_written_as_one_would_write_it(name: str) -> None:
    step, _ = CASES[name]()
    place = {"a module in an attribute": "LOG[0]", "far below": "inner['y']"}.get(name, "leaves_on_itself.last")
    with pytest.raises(mt.MlxTuneError, match=re.escape(f"said to change: {place}.")):
        mt.estimate_memory(step, X)


def test_what_the_code_of_a_model_in_the_state_leaves_is_found() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def __call__(self, x: mx.array) -> mx.array:
            y = self.inner(x).sum()
            left_behind.LOG.append(y)
            return y

    model = Model()
    with pytest.raises(mt.MlxTuneError, match=r"said to change: .*LOG\[0\]"):
        mt.estimate_memory(model, X, state=model)
    assert left_behind.LOG == []


def test_what_a_model_in_the_state_leaves_in_its_own_objects_is_put_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.shelf = nn.Linear(3, 3), types.SimpleNamespace(value=None)

        def __call__(self, x: mx.array) -> mx.array:
            self.shelf.value = self.inner(x).sum()
            return self.shelf.value

    model = Model()
    mt.estimate_memory(model, X, state=model)
    assert model.shelf.value is None
