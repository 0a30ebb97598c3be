"""Quick collections, and the searches that take many of them."""

import gc
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune as mt
from mlx_tune.garbage import is_frozen, no_collections, quick_collections


@pytest.fixture(params=["as it is", "a Python that froze some"])
def python(request, monkeypatch):
    """This Python, and one that, as since 3.12, has frozen a few objects of its own before a program begins."""
    if request.param != "as it is":
        count = gc.get_freeze_count
        monkeypatch.setattr(gc, "get_freeze_count", lambda: 375 + count())


def test_garbage_is_collected_and_objects_that_the_program_froze_stay_frozen(python):
    seen, older = [], ["an object from before"]
    with quick_collections():
        assert is_frozen(older)
        array = mx.zeros(1000)
        cycle = [array]
        cycle.append(cycle)
        seen.append(weakref.ref(array))
        del array, cycle
        gc.collect()
        assert is_frozen(older)
    assert seen[0]() is None
    assert not is_frozen(older)
    gc.freeze()
    try:
        newer = ["an object from afterwards"]
        with quick_collections():
            assert not is_frozen(newer)
        assert is_frozen(older)
    finally:
        gc.unfreeze()


def test_no_collection_starts_by_itself_and_what_was_switched_off_stays_off():
    assert gc.isenabled()
    with no_collections():
        assert not gc.isenabled()
        with no_collections():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), no_collections():
        1 / 0
    assert gc.isenabled()


def test_an_estimate_collects_no_garbage_and_leaves_the_collector_on():
    def step(x):
        assert not gc.isenabled()
        return (x * x).sum()

    assert mt.estimate_memory(step, mx.ones(3)).operations
    assert gc.isenabled()


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
def test_searches_look_at_their_own_garbage_alone(search, python):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    gradients = nn.value_and_grad(model, lambda model, x: model(x).square().mean())
    older, frozen = ["an object from before"], []

    def step(x):
        frozen.append(is_frozen(older))
        return gradients(model, x)[0]

    search(model, step)
    assert frozen
    assert all(frozen)
    assert not is_frozen(older)
