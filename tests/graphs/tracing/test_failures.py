from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

from mlx_tune.errors import TraceError
from mlx_tune.graphs import estimate_memory


def evaluates(x: mx.array) -> mx.array:
    y = x * 2
    mx.eval(y)
    return y


def branches(x: mx.array) -> mx.array:
    if x.sum() > 0:
        return x
    return -x


def reads_item(x: mx.array) -> float:
    return x.sum().item()


@pytest.mark.parametrize(
    ("step", "line"), [(evaluates, "mx.eval(y)"), (branches, "if x.sum() > 0:"), (reads_item, "return x.sum().item()")]
)
def test_a_step_that_evaluates_is_told_where(step: Callable[[mx.array], Any], line: str) -> None:
    with pytest.raises(TraceError, match="The step evaluates an array at ") as caught:
        estimate_memory(step, mx.ones((4,)))
    assert f"`{line}`" in str(caught.value)
    assert "test_failures.py:" in str(caught.value)


@pytest.mark.parametrize("result", [None, 3.0, {"loss": "none"}])
def test_a_step_that_returns_no_array_is_refused(result: object) -> None:
    with pytest.raises(TraceError, match="in which there is no array"):
        estimate_memory(lambda x: result, mx.ones((4,)))


@dataclass
class Outcome:
    loss: mx.array


async def awaited(x: mx.array) -> mx.array:
    return x.sum()


def yielding(x: mx.array) -> Iterator[mx.array]:
    yield x.sum()


@pytest.mark.parametrize(
    ("step", "what"),
    [
        (lambda x: Outcome(x.sum()), r"returned a Outcome, .* lists, tuples and dictionaries"),
        (awaited, "returned a coroutine: calling it runs nothing"),
        (yielding, "returned a generator: calling it runs nothing"),
    ],
)
def test_what_hides_its_arrays_is_said_without_evaluating_them(step: Callable[[mx.array], Any], what: str) -> None:
    with pytest.raises(TraceError, match=what):
        estimate_memory(step, mx.ones((4,)))
