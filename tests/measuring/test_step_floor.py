from __future__ import annotations

import json
import sys
from unittest import mock

import keeping_up
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import small_steps

import mlx_tune as mt
from mlx_tune.batching import probe
from mlx_tune.graphs import estimate as estimating
from mlx_tune.measuring.floors import Floor
from mlx_tune.measuring.forecast import Forecast


def deep(layers):
    """As many layers as a large model has, of next to no arithmetic."""
    mx.random.seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    optimizer = optim.AdamW(1e-4)
    mx.eval(model.parameters())
    step = small_steps.training_step(model, optimizer, lambda model, x: model(x).square().mean())
    return step, lambda n: mx.ones((n, 8)), (model, optimizer)


def counted(made):
    """The graphs that a search looks at, and the steps that it runs."""
    looked, ran = [], []
    follow, run = estimating.follow_step, probe.run_step

    def following(step, args, state):
        looked.append(args[0].shape[0])
        return follow(step, args, state)

    def running(step, args, state, limit, **how):
        ran.append((args[0].shape[0], limit))
        return run(step, args, state, limit, **how)

    step, make_batch, state = deep(64)
    if made == "before":
        mx.eval(step(make_batch(1)), state[0].parameters(), state[1].state)
    budget = mx.get_active_memory() + 8_000_000
    with mock.patch.object(estimating, "follow_step", following), mock.patch.object(probe, "run_step", running):
        result = mt.autobatch(step, make_batch, budget=budget, state=state, progress=False)
    assert result.peak_bytes <= budget
    return {"looked": looked, "ran": ran}


@pytest.mark.cpu_only
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
