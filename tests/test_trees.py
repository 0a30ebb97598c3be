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
from mlx.utils import tree_map

import mlx_tune as mt
from mlx_tune.graphs.tracing.trace import trace_step
from mlx_tune.state import Snapshot
from mlx_tune.trees import arrays_of, nbytes_of, outermost, state_arrays, walk
from mlx_tune.wiring.limits import read_request


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
    "models of a refusal": lambda model, step, state: outermost(state, nn.Module) == [model] or pytest.fail("none"),
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


def adam(model: Any) -> Any:
    return made(optim.AdamW(optim.cosine_decay(0.1, 10)), model)


def several(model: Any) -> Any:
    return made(
        optim.MultiOptimizer([optim.SGD(0.1, momentum=0.9), optim.Adam(0.1)], [lambda name, _: "a" in name]), model
    )


class Averaging(optim.SGD):
    """Keeps an average of the weights beside its state."""

    def __init__(self, model: Any) -> None:
        super().__init__(0.1)
        self.average = tree_map(mx.zeros_like, model.parameters())


class OfOnesOwn:
    """No optimizer of MLX's, but with a state like one."""

    def __init__(self, model: Any) -> None:
        self.state = tree_map(mx.zeros_like, model.parameters())


def made(optimizer: Any, model: Any) -> Any:
    optimizer.init(model.trainable_parameters())
    return optimizer


def in_a_module(model: Any) -> Any:
    model.optimizer = adam(model)  # an attribute beside the parameters
    return model


def loose(model: Any) -> Any:
    return [mx.zeros(3), {"shared": model.layers[0].a.weight, "again": (model.layers[0].a.weight,)}]


KINDS: dict[str, Callable[[Any], Any]] = {
    "adam": adam,
    "several": several,
    "averaging": Averaging,
    "one's own": OfOnesOwn,
    "in a module": in_a_module,
    "loose": loose,
}


def traced_bytes(state: Any) -> int:
    """The bytes of a state by the graph of a step that replaces every array of it."""

    def step(x: mx.array) -> mx.array:
        for slot in state_arrays(state):
            slot.put(slot.array + x.sum().astype(slot.array.dtype))
        return x

    graph = trace_step(step, [mx.ones(1)], state)
    inputs = [graph.values[i] for i in graph.inputs()]
    return sum(value.nbytes for value in inputs if value.role not in ("batch", "captured"))


COUNTS: dict[str, Callable[[Any], int]] = {
    "arrays": lambda state: sum(a.nbytes for a in {id(a): a for a in arrays_of(state)}.values()),
    "places": lambda state: sum(a.nbytes for a in {id(s.array): s.array for s in state_arrays(state)}.values()),
    "wired": lambda state: sum(read_request(state, 0.0, 0).arrays.values()),
    "spilled": lambda state: _spilled(state),
    "traced": traced_bytes,
}


def _spilled(state: Any) -> int:
    snapshot = Snapshot(state, spill=True)
    arrays: Any = mx.load(str(snapshot._file))
    size = sum(array.nbytes for array in arrays.values())
    snapshot.discard()
    return size


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_function_finds_the_same_arrays_in_a_state(kind: str, count: str) -> None:
    state = KINDS[kind](Net())
    mx.eval(list(arrays_of(state)))
    assert COUNTS[count](state) == nbytes_of(state) > 0


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_array_that_is_found_comes_back(kind: str, spill: bool) -> None:
    state = KINDS[kind](Net())
    mx.eval(list(arrays_of(state)))
    before = [(slot.label, slot.role, slot.array.tolist()) for slot in state_arrays(state)]
    with Snapshot(state, spill=spill):
        for slot in state_arrays(state):
            slot.put(slot.array + mx.array(1, slot.array.dtype))
    assert [(slot.label, slot.role, slot.array.tolist()) for slot in state_arrays(state)] == before


def test_places_are_named_as_the_model_names_them() -> None:
    model = Net()
    found = [
        (slot.role, slot.label) for slot in state_arrays((model, made(optim.Adam(0.1), model), {"loss": mx.zeros(1)}))
    ]
    assert found[0] == ("parameter", "layers.0.a.weight")
    assert [place for place in found if place[0] == "optimizer"][:2] == [
        ("optimizer", "optimizer.step"),
        ("optimizer", "optimizer.learning_rate"),
    ]
    assert found[-1] == ("state", "loss")
    two = [slot.label for slot in state_arrays([nn.Linear(1, 1), nn.Linear(1, 1, bias=False), mx.zeros(1)])]
    assert two == ["state[0].weight", "state[0].bias", "state[1].weight", "state[2]"]


def test_what_cannot_be_replaced_or_is_the_random_stream_has_no_place() -> None:
    assert list(state_arrays([(mx.zeros(1),), mx.random.state])) == []
