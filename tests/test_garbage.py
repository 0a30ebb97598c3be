"""Quick collections, and the searches that take many of them."""

import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune as mt
from mlx_tune.garbage import quick_collections


def test_garbage_is_collected_and_objects_that_the_program_froze_stay_frozen():
    seen, before = [], gc.get_freeze_count()  # newer Pythons freeze a few objects of their own
    with quick_collections():
        array = mx.zeros(1000)
        cycle = [array]
        cycle.append(cycle)
        seen.append(weakref.ref(array))
        del array, cycle
        gc.collect()
        assert gc.get_freeze_count() > 0
    assert seen[0]() is None
    assert gc.get_freeze_count() == before
    gc.freeze()
    try:
        with quick_collections():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def autobatch(model, step):
    mt.autobatch(step, make_batch, budget="20MB", max_batch=4, state=model, progress=False)


def plan_checkpoints(model, step):
    mt.plan_checkpoints(model, step, make_batch, batch_size=2, budget="20MB", progress=False)


def tightest_limit(model, step):
    mt.tightest_limit(step, make_batch(2), state=model, repeats=1, progress=False)


def autofit(model, step):
    mt.autofit(model, step, make_batch, budget="20MB", max_batch=4, progress=False)


def make_batch(n):
    return mx.ones((n, 8))


@pytest.mark.parametrize("search", [autobatch, plan_checkpoints, tightest_limit, autofit])
def test_searches_look_at_their_own_garbage_alone(search):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    gradients = nn.value_and_grad(model, lambda model, x: model(x).square().mean())
    before, frozen = gc.get_freeze_count(), []

    def step(x):
        frozen.append(gc.get_freeze_count())
        return gradients(model, x)[0]

    search(model, step)
    assert min(frozen) > before
    assert gc.get_freeze_count() == before
