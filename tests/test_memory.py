"""track_memory, memory_limit and memory_budget."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune import memory
from mlx_tune.devices import Room
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.memory import MemoryBudget, memory_budget, memory_limit, resolve_budget, track_memory

MB = 10**6


def fill(megabytes):
    """Allocate and drop an array."""
    mx.eval(mx.ones((megabytes * MB // 4,)))


def test_track_memory_sees_the_peak_what_stays_and_what_was_there():
    before = mx.ones((MB,))  # 4 MB
    mx.eval(before)
    start = mx.get_active_memory()
    with track_memory() as m:
        fill(8)
        kept = mx.ones((MB // 2,))  # 2 MB
        mx.eval(kept)
    assert m.peak_bytes >= start + 8 * MB
    assert start + 2 * MB <= m.active_bytes < start + 3 * MB
    assert m.footprint_bytes > m.active_bytes
    assert m.seconds > 0
    assert kept.size == MB // 2


def test_an_inner_tracker_takes_nothing_from_an_outer_one():
    with track_memory() as outer:
        fill(8)
        with track_memory() as inner:
            fill(2)
        with track_memory() as second:
            fill(1)
    assert inner.peak_bytes < 8 * MB <= outer.peak_bytes
    assert second.peak_bytes < inner.peak_bytes


def test_a_peak_inside_an_inner_tracker_reaches_the_outer_one():
    with track_memory() as outer:
        with track_memory() as inner:
            fill(8)
        fill(1)
    assert outer.peak_bytes >= inner.peak_bytes >= 8 * MB


def test_figures_are_fixed_when_the_block_ends():
    with track_memory() as m:
        fill(1)
    first = m.to_dict()
    fill(16)
    assert m.to_dict() == first
    assert json.loads(json.dumps(first)) == first
    assert "peak" in str(m)


def test_figures_can_be_read_while_the_block_runs():
    with track_memory() as m:
        fill(4)
        assert m.peak_bytes >= 4 * MB
        assert m.seconds > 0
        assert m.active_bytes == mx.get_active_memory()
        assert m.cache_bytes == mx.get_cache_memory()


def test_queued_work_is_waited_for():
    with track_memory() as m:
        x = mx.ones((MB,)) + 1
        mx.async_eval(x)
        del x
    assert m.peak_bytes >= 4 * MB


def test_the_blocks_own_exception_is_the_one_that_is_seen(monkeypatch):
    def fails():
        raise RuntimeError("the device is gone")

    tracker = track_memory()
    with pytest.raises(KeyError, match="mine"), tracker:  # noqa: PT012 - the tracker's exit is what is tested
        monkeypatch.setattr(mx, "synchronize", fails)
        raise KeyError("mine")
    assert track_memory._open == []
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="device is gone"), tracker:
        monkeypatch.setattr(mx, "synchronize", fails)
    assert track_memory._open == []


def test_track_memory_as_a_decorator_counts_each_call():
    calls = []

    @track_memory()
    def work():
        calls.append(len(track_memory._open))
        if len(calls) < 3:
            work()

    work()
    assert calls == [1, 2, 3]


def test_memory_limit_sets_nests_and_restores():
    before = mx.set_memory_limit(10**12)
    mx.set_memory_limit(before)
    with memory_limit("2GB") as outer:
        assert mx.get_memory_limit() == outer.limit_bytes == 2 * 10**9
        with memory_limit(10**9):
            assert mx.get_memory_limit() == 10**9
        assert mx.get_memory_limit() == 2 * 10**9
    assert mx.get_memory_limit() == before


def test_memory_limit_restores_after_an_exception():
    before = mx.get_memory_limit()
    with pytest.raises(KeyError), memory_limit("2GB"):
        raise KeyError
    assert mx.get_memory_limit() == before


def test_memory_limits_may_end_in_any_order():
    before = mx.get_memory_limit()
    first, second = memory_limit(10**9), memory_limit(2 * 10**9)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert mx.get_memory_limit() == 2 * 10**9, "the one that is still open decides"
    second.__exit__(None, None, None)
    assert mx.get_memory_limit() == before


def test_memory_limits_in_threads_leave_nothing_behind():
    before = mx.get_memory_limit()
    barrier = threading.Barrier(4)

    def work(size):
        barrier.wait()
        with memory_limit(size):
            barrier.wait()

    threads = [threading.Thread(target=work, args=(size * 10**9,)) for size in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mx.get_memory_limit() == before


def test_a_memory_limit_block_is_not_opened_twice():
    block = memory_limit("1GB")
    with block, pytest.raises(InvalidArgumentError, match="open already"):
        block.__enter__()


def test_memory_limit_as_a_decorator():
    before = mx.get_memory_limit()

    @memory_limit("3GB")
    def inside():
        return mx.get_memory_limit()

    assert inside() == inside() == 3 * 10**9
    assert mx.get_memory_limit() == before


@pytest.mark.parametrize("bad", ["lots", -1, None])
def test_a_bad_limit_changes_nothing(bad):
    before = mx.get_memory_limit()
    with pytest.raises(InvalidArgumentError):
        memory_limit(bad)
    assert mx.get_memory_limit() == before


def test_the_budget_says_from_what():
    budget = memory_budget()
    assert budget > 0
    assert budget.fraction == 0.9
    assert budget.source in {room.source for room in budget.rooms}
    assert "90%" in str(budget)
    assert budget == int(0.9 * min(room.bytes for room in budget.rooms))
    assert f"{budget:d}" == str(int(budget))


@given(
    rooms=st.lists(st.integers(0, 10**12), min_size=1, max_size=4),
    working_set=st.none() | st.integers(0, 10**12),
    active=st.integers(0, 10**10),
    cache=st.integers(0, 10**10),
    share=st.floats(0.01, 1),
)
def test_the_smallest_room_decides_and_what_mlx_holds_counts_as_usable(rooms, working_set, active, cache, share):
    free = tuple(Room(size, f"counter {i}") for i, size in enumerate(rooms))
    budget = memory._budget_from(share, free, working_set, memory._Held(active, cache))
    candidates = [size + active + cache for size in rooms] + ([] if working_set is None else [working_set])
    assert budget == int(share * min(candidates))
    assert len(budget.rooms) == len(candidates)


@pytest.mark.parametrize("bad", [0, 1.5, -0.1, "0%", "x"])
def test_memory_budget_refuses_a_share_that_is_none(bad):
    with pytest.raises(InvalidArgumentError, match=r"share|leaves nothing|outside"):
        memory_budget(bad)


@pytest.mark.parametrize(("budget", "expected"), [("24GB", 24 * 10**9), (10**9, 10**9), (2e9, 2 * 10**9)])
def test_resolve_budget_reads_sizes(budget, expected):
    assert resolve_budget(budget) == expected
    assert resolve_budget(budget).source == "given"


def test_resolve_budget_reads_shares_of_this_machine():
    room = min(room.bytes for room in resolve_budget(None).rooms)
    for budget in (0.5, "50%", " 50 %"):
        assert int(resolve_budget(budget)) == pytest.approx(0.5 * room, rel=0.2)
    again = resolve_budget(0.5)
    assert resolve_budget(again) is again


@pytest.mark.parametrize("bad", [0, "0GB", "most", -5, True, 1.5])
def test_resolve_budget_refuses(bad):
    with pytest.raises(InvalidArgumentError):
        resolve_budget(bad)


def test_a_budget_keeps_its_origin_through_copies_and_json():
    budget = MemoryBudget(5, "a counter", 0.5, (Room(10, "a counter"),))
    for twin in (copy.deepcopy(budget), pickle.loads(pickle.dumps(budget))):
        assert twin == 5
        assert twin.source == "a counter"
        assert twin.rooms == budget.rooms
    assert json.dumps({"budget_bytes": budget}) == '{"budget_bytes": 5}'


def test_the_open_limit_is_the_innermost_one():
    assert memory.open_limit_bytes() is None
    with memory_limit("20GB"):
        with memory_limit("10GB"):
            assert memory.open_limit_bytes() == 10 * 10**9
        assert memory.open_limit_bytes() == 20 * 10**9
    assert memory.open_limit_bytes() is None


def test_a_watcher_hears_of_a_limit_before_it_is_set_and_may_refuse(monkeypatch):
    heard = []

    def refuse(limit):
        heard.append((limit, mx.get_memory_limit()))
        raise UserWarning("no")

    before = mx.get_memory_limit()
    monkeypatch.setattr(memory, "limit_watchers", [refuse])
    with pytest.raises(UserWarning, match="no"):
        memory_limit("20GB").__enter__()
    assert heard == [(20 * 10**9, before)]
    assert mx.get_memory_limit() == before
    assert memory.open_limit_bytes() is None
