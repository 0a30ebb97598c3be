"""What a function leaves in the code around it is found by tracing and by checkpointing alike."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
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
