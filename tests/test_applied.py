"""What `applied()` of every result sets, and puts back: the limits it was measured under, and its checkpoints."""

import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

import mlx_tune as mt
from mlx_tune.memory import cache_limit, open_limit_bytes

mx.random.seed(0)
MODEL = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
OPTIMIZER = optim.SGD(0.01)
VALUE_AND_GRAD = nn.value_and_grad(MODEL, lambda x: MODEL(x).square().mean())


def step(x):
    loss, gradients = VALUE_AND_GRAD(x)
    OPTIMIZER.update(MODEL, gradients)
    return loss


def make_batch(n):
    return mx.ones((n, 50, 64))


STATE = (MODEL, OPTIMIZER)
mx.eval(MODEL.parameters(), mx.random.state)
ONE, FOUR = np.int64(1), np.int32(4)  # whole numbers are NumPy's as well as Python's
SEARCHED = {
    "budget": np.int64(4_000_000),
    "min_batch": ONE,
    "max_batch": FOUR,
    "multiple_of": ONE,
    "target_batch": FOUR,
    "steps": ONE,
}
RESULTS = {
    "autobatch": lambda: mt.autobatch(
        step,
        make_batch,
        **SEARCHED,
        state=STATE,
        progress=False,
    ),
    "autobatch_by_length": lambda: mt.autobatch_by_length(
        step,
        lambda n, length: mx.ones((n, length, 64)),
        np.array([50]),
        budget="4MB",
        max_batch=FOUR,
        state=STATE,
        progress=False,
    )[50],
    "autofit": lambda: mt.autofit(
        MODEL,
        step,
        make_batch,
        **SEARCHED,
        state=OPTIMIZER,
        progress=False,
    ),
    "plan_checkpoints": lambda: mt.plan_checkpoints(
        MODEL,
        step,
        make_batch,
        batch_size=FOUR,
        steps=ONE,
        budget=np.int64(mx.get_active_memory() + 800_000),
        state=OPTIMIZER,
        progress=False,
    ),
    "tightest_limit": lambda: mt.tightest_limit(step, make_batch(4), state=STATE, repeats=ONE, progress=False),
}


def in_force():
    checkpointed = tuple(path for path, block in MODEL.named_modules() if mt.is_checkpointed(block))
    return open_limit_bytes(), cache_limit(), sorted(checkpointed)


@pytest.mark.parametrize("name", RESULTS)
def test_applied_holds_limits_and_checkpoints_and_yields_the_result(name):
    result = RESULTS[name]()
    before = in_force()
    cache = getattr(result, "cache_limit_bytes", None)
    paths = getattr(result, "paths", ())
    seen = []

    def train():
        with result.applied() as applied:
            seen.extend([applied, in_force()])
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert seen == [result, (result.limit_bytes, before[1] if cache is None else cache, sorted(paths))]
    assert in_force() == before
    json.dumps(result.to_dict())


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", [name for name in RESULTS if name != "tightest_limit"])
def test_where_there_is_a_budget_peak_and_cache_stay_within_it_together(name):
    result = RESULTS[name]()
    assert result.peak_bytes + result.cache_limit_bytes <= result.budget_bytes
    assert result.to_dict()["cache_limit_bytes"] == result.cache_limit_bytes
