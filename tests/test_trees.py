"""State that contains itself is walked to its end everywhere alike; arguments and results that do are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_tune as mt
from mlx_tune.batching.refusals import _models
from mlx_tune.trees import arrays_of, walk


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.b(mx.tanh(self.a(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [Block() for _ in range(3)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def in_a_list(model: Any, optimizer: Any) -> Any:
    state = [model, optimizer]
    state.append(state)
    return state


def in_a_dictionary(model: Any, optimizer: Any) -> Any:
    state = {"model": model, "optimizer": optimizer}
    state["itself"] = state
    return state


def in_turns(model: Any, optimizer: Any) -> Any:
    first: dict[str, Any] = {"model": model}
    second = [optimizer, first]
    first["second"] = second
    return first, second


def batch(size: int) -> mx.array:
    return mx.ones((size, 8))


LITTLE: dict[str, Any] = {"budget": "20MB", "progress": False}
CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "estimate_memory": lambda model, step, state: mt.estimate_memory(step, batch(2), state=state),
    "autobatch": lambda model, step, state: mt.autobatch(step, batch, max_batch=4, canary=True, state=state, **LITTLE),
    "plan_checkpoints": lambda model, step, state: mt.plan_checkpoints(
        model, step, batch, batch_size=4, budget="20MB", state=state
    ),
    "autofit": lambda model, step, state: mt.autofit(model, step, batch, target_batch=4, state=state, **LITTLE),
    "tightest_limit": lambda model, step, state: mt.tightest_limit(step, batch(2), state=state),
    "models of a refusal": lambda model, step, state: _models(state) == [model] or pytest.fail("not found"),
}


@pytest.mark.parametrize("cycle", [in_a_list, in_a_dictionary, in_turns])
@pytest.mark.parametrize("name", CALLS)
def test_state_that_contains_itself_works(name: str, cycle: Callable[[Any, Any], Any]) -> None:
    model, optimizer = Net(), optim.SGD(0.1)
    mx.eval(model.parameters())
    gradients = nn.value_and_grad(model, lambda model, x: model(x).square().mean())

    def step(x: mx.array) -> mx.array:
        loss, made = gradients(model, x)
        optimizer.update(model, made)
        return loss

    weight = model.layers[0].a.weight.tolist()
    CALLS[name](model, step, cycle(model, optimizer))
    assert model.layers[0].a.weight.tolist() == weight


@pytest.mark.parametrize("cycle", [in_a_list, in_a_dictionary, in_turns])
def test_a_model_in_state_that_contains_itself_is_wired(cycle: Callable[[Any, Any], Any]) -> None:
    model = nn.Linear(4, 4)
    assert mt.wired_limit(cycle(model, optim.SGD(0.1))) is not None


@pytest.mark.parametrize("cycle", [in_a_list, in_a_dictionary, in_turns])
def test_a_checkpointed_function_may_reach_what_contains_itself(cycle: Callable[[Any, Any], Any]) -> None:
    held = cycle(mx.array([2.0]), [])
    weight = next(arrays_of(held))
    function = mt.checkpoint(lambda x: (x * next(arrays_of(held))).sum())
    assert mx.grad(function)(mx.array([1.0])).tolist() == weight.tolist()


def test_arguments_and_results_that_contain_themselves_are_refused_by_name() -> None:
    endless: list[Any] = [mx.ones((2,))]
    endless.append(endless)
    with pytest.raises(mt.InvalidArgumentError, match=r"args\[0\]\[1\] is a list that contains itself"):
        mt.estimate_memory(lambda x: x[0].sum(), endless)
    with pytest.raises(mt.InvalidArgumentError, match=r"result\[1\] is a list that contains itself"):
        mt.estimate_memory(lambda x: endless, mx.ones((2,)))
    twice = [mx.ones((2,))]
    assert mt.estimate_memory(lambda x: (x[0][0] + x[1][0]).sum(), (twice, twice)).floor_bytes > 0


TREES = st.recursive(
    st.integers(), lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner)
)


def plainly(tree: Any) -> list[int]:
    """The numbers of a tree, by recursion."""
    if isinstance(tree, int):
        return [tree]
    return [number for child in (tree.values() if isinstance(tree, dict) else tree) for number in plainly(child)]


@given(TREES)
def test_the_walk_finds_what_recursion_finds(tree: Any) -> None:
    assert [node for node in walk(tree) if isinstance(node, int)] == plainly(tree)
