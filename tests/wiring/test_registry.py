import gc
import random
import threading

import pytest

from mlx_tune.wiring.registry import Registry, WiredRequest, rule, total_bytes


class Allocator:
    def __init__(self, limit=0):
        self.limit, self.events, self.refuse_above = limit, [], None

    def set(self, limit):
        if self.refuse_above is not None and limit > self.refuse_above:
            raise RuntimeError("refused")
        self.events.append(limit)
        self.limit, previous = limit, self.limit
        return previous

    def clear(self):
        self.events.append("clear")


class Tokens(Registry):
    """A registry whose `enter` makes the token too."""

    def enter(self, request, cap_bytes):
        token = self.make_token()
        return token, super().enter(token, request, cap_bytes)


def make(limit=0):
    allocator = Allocator(limit)
    return Tokens(allocator.set, allocator.clear), allocator


@pytest.mark.parametrize(
    ("requests", "total"),
    [
        ([], 0),
        ([WiredRequest({"a": 100, "b": 50})], 150),
        ([WiredRequest({"a": 100}, 0.2)], 120),
        ([WiredRequest({"a": 100}, 0.2), WiredRequest({"a": 100, "b": 10}, 0.5)], 165),  # the larger headroom counts
        ([WiredRequest({"a": 100}), WiredRequest(extra_bytes=7), WiredRequest(extra_bytes=7)], 114),
        ([WiredRequest({"a": 3}, 0.5)], 4),  # rounded down
    ],
)
def test_each_array_counts_once_and_bytes_add_up(requests, total):
    assert total_bytes(requests) == total


@pytest.mark.parametrize(
    ("wanted", "baseline", "cap", "limit"), [(30, 0, 100, 30), (30, 40, 100, 40), (300, 40, 100, 100), (0, 7, 5, 5)]
)
def test_the_rule(wanted, baseline, cap, limit):
    assert rule([WiredRequest(extra_bytes=wanted)], baseline, cap) == limit


@pytest.mark.parametrize("baseline", [0, 25, 60, 200])
def test_the_baseline_is_learned_and_comes_back(baseline):
    registry, allocator = make(baseline)
    first, limit = registry.enter(WiredRequest(extra_bytes=30), 100)
    assert limit == allocator.limit == min(100, max(baseline, 30))
    second, limit = registry.enter(WiredRequest(extra_bytes=50), 100)
    assert limit == allocator.limit == min(100, max(baseline, 80))
    registry.leave(first)
    assert allocator.limit == min(100, max(baseline, 50))
    registry.leave(second)
    assert allocator.limit == baseline
    assert registry.live == 0


def test_leaving_twice_does_nothing():
    registry, allocator = make(5)
    first, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    second, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    registry.leave(first)
    registry.leave(first)
    assert allocator.limit == 30
    registry.leave(second)
    registry.leave(second)
    assert allocator.limit == 5


def test_the_cache_is_cleared_before_every_raise_and_only_then():
    registry, allocator = make()
    first, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    second, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    registry.leave(second)
    registry.leave(first)
    assert allocator.events == ["clear", 30, "clear", 60, 30, 0]


def test_a_refused_limit_takes_the_request_out_again():
    registry, allocator = make(10)
    first, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    allocator.refuse_above = 50
    with pytest.raises(RuntimeError, match="refused"):
        registry.enter(WiredRequest(extra_bytes=40), 100)
    assert registry.live == 1
    assert allocator.limit == 30
    registry.leave(first)
    assert allocator.limit == 10


def test_a_limit_that_an_outsider_took_back_is_not_restored():
    registry, allocator = make(90)  # somebody wired 90 before, and leaves first
    token, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    allocator.limit = 0
    registry.leave(token)
    assert allocator.limit == 0


def test_a_limit_that_an_outsider_raised_and_left_goes():
    registry, allocator = make(5)
    first, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    allocator.limit = 100
    second, limit = registry.enter(WiredRequest(extra_bytes=10), 100)
    assert limit == allocator.limit == 40
    registry.leave(first)
    registry.leave(second)
    assert allocator.limit == 5


def test_a_limit_that_an_outsider_set_is_put_right_when_asked():
    registry, allocator = make(5)
    token, _ = registry.enter(WiredRequest(), 100)  # asks for nothing, and brings the baseline back
    assert allocator.limit == 5
    other, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    allocator.limit = 100
    registry.hold()
    assert allocator.limit == 30
    registry.leave(other)
    allocator.limit = 100
    registry.leave(token)
    assert allocator.limit == 5


def test_a_collector_that_runs_while_the_limit_is_set_loses_nothing():
    registry, allocator = make(1)
    dropped, _ = registry.enter(WiredRequest(extra_bytes=30), 100)
    plain_set = allocator.set

    def set_while_collecting(limit):
        allocator.set = plain_set
        registry._set_limit = plain_set
        registry.leave(dropped)  # what a finalizer does, in the same thread, under the lock
        return plain_set(limit)

    registry._set_limit = set_while_collecting
    kept, limit = registry.enter(WiredRequest(extra_bytes=50), 100)
    assert limit == allocator.limit == 50
    registry.leave(kept)
    assert allocator.limit == 1


def test_threads_leave_the_baseline_behind():
    registry, allocator = make(3)
    barrier, failures = threading.Barrier(8), []

    def work(seed):
        draw = random.Random(seed)
        open_tokens = []
        barrier.wait()
        try:
            for _ in range(60):
                if open_tokens and draw.random() < 0.5:
                    registry.leave(open_tokens.pop(draw.randrange(len(open_tokens))))
                else:
                    token, limit = registry.enter(WiredRequest(extra_bytes=draw.randrange(50)), 100)
                    assert 3 <= limit <= 100
                    open_tokens.append(token)
            for token in open_tokens:
                registry.leave(token)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert failures == []
    assert registry.live == 0
    assert allocator.limit == 3
    assert max(event for event in allocator.events if event != "clear") <= 100
