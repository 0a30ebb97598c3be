"""Two readings of the graph against the floor of every size between and beyond them."""

import json
import sys
from itertools import pairwise
from unittest import mock

import keeping_up
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import small_steps
from hypothesis import given
from hypothesis import strategies as st

import mlx_tune as mt
from mlx_tune.batching.probe import Probe
from mlx_tune.graphs import estimate as estimating
from mlx_tune.measuring.floors import Floor, pieces
from mlx_tune.measuring.forecast import Forecast
from mlx_tune.measuring.step_floor import StepFloor


def straight(knots, size):
    """Straight lines between knots."""
    for (a, low), (b, high) in pairwise(sorted(knots.items())):
        if a <= size <= b:
            return low + (size - a) / (b - a) * (high - low)
    raise AssertionError(f"no knots around {size}")


@given(
    operations=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**4)), min_size=1, max_size=12),
    a=st.integers(1, 20),
    distance=st.integers(1, 100),
)
def test_the_bends_give_the_highest_operation_at_every_size(operations, a, distance):
    """Operation i has start_i + rise_i * n bytes alive."""
    b = a + distance

    def alive(size):
        live = [start + rise * size for start, rise in operations]
        return Floor(max(live), live)

    found = pieces((a, alive(a)), (b, alive(b)), 4000)
    if not any(rise for _, rise in operations):
        assert found is None
    if found is None:
        return
    knots = found | {a: alive(a).bytes}
    for size in {*range(a, 200), 1000, 3999, 4000}:
        if a <= size <= max(knots):
            assert straight(knots, size) == pytest.approx(alive(size).bytes, abs=1 + 1e-9 * alive(size).bytes)


def test_nothing_is_said_where_other_operations_ran():
    assert pieces((1, Floor(3, (1, 2, 3))), (8, Floor(5, (4, 5))), 100) is None
    assert pieces((1, Floor(3)), (8, Floor(5)), 100) is None


@pytest.mark.parametrize("compiled", [False, True])
def test_two_looks_at_a_graph_foresee_all_others(compiled):
    floor = StepFloor(*small_steps.build(compiled=compiled))
    small, large = floor(4), floor(12)
    knots = pieces((4, small), (12, large), 10**6) | {4: small.bytes, 12: large.bytes}
    for size in (5, 7, 40, 333):
        assert straight(knots, size) == pytest.approx(floor(size).bytes, rel=1e-3)


def deep(layers):
    """As many layers as a large model has, of next to no arithmetic."""
    mx.random.seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    optimizer = optim.AdamW(1e-4)
    mx.eval(model.parameters())
    grad = nn.value_and_grad(model, lambda model, x: model(x).square().mean())

    def step(x):
        loss, gradients = grad(model, x)
        optimizer.update(model, gradients)
        return loss

    return step, lambda n: mx.ones((n, 8)), (model, optimizer)


def counted(made):
    """The graphs that a search looks at, and the steps that it runs."""
    looked, ran = [], []
    follow, run = estimating.follow_step, Probe._step_once

    def following(step, args, state):
        looked.append(args[0].shape[0])
        return follow(step, args, state)

    def running(probe, batch, limit, size, cache):
        ran.append((size, limit))
        return run(probe, batch, limit, size, cache)

    step, make_batch, state = deep(64)
    if made == "before":
        mx.eval(step(make_batch(1)), state[0].parameters(), state[1].state)
    budget = mx.get_active_memory() + 8_000_000
    with mock.patch.object(estimating, "follow_step", following), mock.patch.object(Probe, "_step_once", running):
        result = mt.autobatch(step, make_batch, budget=budget, state=state, progress=False)
    assert result.peak_bytes <= budget
    return {"looked": looked, "ran": ran}


@pytest.mark.skipif(not keeping_up.CAN_KEEP_UP, reason="threads cannot choose their core here")
@pytest.mark.parametrize(("made", "estimates"), [("before", 3), ("by the trials", 3)])
def test_a_search_looks_at_three_graphs_and_runs_a_dozen_steps(made, estimates):
    """Of 64 layers, tracing one step takes as long as running several. Where the worker falls behind, peaks scatter."""
    found = json.loads(keeping_up.in_own_process(__file__, made))
    assert len(found["looked"]) == estimates, found
    assert len(found["ran"]) <= 12, found
    assert sum(limit == 1 for _, limit in found["ran"]) <= 3  # these take several times as long


def test_a_look_that_was_not_foreseen_is_not_relied_on():
    """Past 100 rows, padding to another kernel's tile takes twice the memory for each."""
    asked = []

    def padded(size):
        asked.append(size)
        live = [1000, 1000 + 10 * size + (10 * (size - 100) if size > 100 else 0)]
        return Floor(max(live), live)

    forecast = Forecast(padded, range(1, 10**6), 50_000)
    assert len(asked) <= 8
    answer = (50_000 + 1000 - 1000) // 20
    assert forecast(answer) == pytest.approx(padded(answer).bytes, rel=0.01)
    asked.clear()
    assert forecast.look(1000)
    assert asked == [1000]


if __name__ == "__main__":
    keeping_up.keep_up()
    print(json.dumps(counted(sys.argv[1])))
