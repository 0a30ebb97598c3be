"""What a block writes is written once; what it logs and counts is there for both runs."""

import gc
import sys
from collections import Counter, defaultdict
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoint_contract import bare_checkpoint
from mlx_lm.models.cache import KVCache

import mlx_tune as mt


class CachedBlock(nn.Module):
    """Attention-like: appends to a cache that it is given."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def __call__(self, x, cache):
        keys = self.inner(x)
        keys, values = cache.update_and_fetch(keys[None, None], keys[None, None] * 2)
        return (keys * values).sum(axis=(0, 1, 2)) + x


class ListCache:
    """A cache with the arrays in a list and its position next to it."""

    def __init__(self):
        self.parts = []
        self.offset = 0

    def update_and_fetch(self, keys, values):
        self.parts.append((keys, values))
        self.offset += keys.shape[2]
        return mx.concatenate([k for k, _ in self.parts], 2), mx.concatenate([v for _, v in self.parts], 2)


def held(cache):
    if isinstance(cache, ListCache):
        return [part for pair in cache.parts for part in pair]
    return list(cache.state)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", [KVCache, ListCache])
def test_cache_is_written_once(kind):
    """Two calls of the block on one cache in a step, so that the second reads what the first wrote."""
    results = []
    for wrap in (False, True):
        mx.random.seed(0)
        block = CachedBlock()
        if wrap:
            mt.checkpoint(block)
        cache = kind()
        cache.update_and_fetch(mx.ones((1, 1, 2, 4)), mx.ones((1, 1, 2, 4)))

        def loss(x, block=block, cache=cache):
            return (block(block(x, cache), cache) ** 2).mean()

        value, gradient = nn.value_and_grad(block, loss)(mx.ones((3, 4)))
        mx.eval(value, gradient)
        results.append((value, gradient["inner"], cache.offset, held(cache)))
    (value, gradient, offset, state), (value2, gradient2, offset2, state2) = results
    assert offset == offset2 == 8
    assert value.item() == value2.item()
    for name in gradient:
        assert mx.allclose(gradient[name], gradient2[name], rtol=1e-6, atol=1e-6)
    assert len(state) == len(state2)
    assert all(mx.array_equal(a, b) for a, b in zip(state, state2, strict=True))


def test_mx_checkpoint_writes_the_cache_twice():
    block, cache = bare_checkpoint(CachedBlock()), KVCache()
    nn.value_and_grad(block, lambda x: block(x, cache).sum())(mx.ones((3, 4)))
    assert cache.offset == 6


def test_running_statistics_are_updated_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm(4)

        def __call__(self, x):
            return self.norm(x) * 2

    x = mx.arange(12).reshape(3, 4).astype(mx.float32)
    means = []
    for wrap in (lambda block: block, mt.checkpoint, bare_checkpoint):
        block = wrap(Block())
        mx.eval(nn.value_and_grad(block, lambda x, block=block: block(x).sum())(x), block.state)
        means.append(block.norm.running_mean.tolist())
    assert means[0] == means[1] != means[2]


def test_logs_and_counters_see_both_runs():
    log, counts, holder, number = [], Counter(), SimpleNamespace(calls=0), 0

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.calls = 0
            self.seen = []

        def __call__(self, x):
            nonlocal number
            self.calls += 1
            self.seen.append(mt.is_recomputing())
            log.append(x.shape)
            counts["block"] += 1
            holder.calls += 1
            number += 1
            return self.inner(x)

    block = mt.checkpoint(Block())
    for _ in range(3):
        mx.eval(nn.value_and_grad(block, lambda x: block(x).sum())(mx.ones((1, 2))))
    assert block.calls == counts["block"] == holder.calls == number == len(log) == 6
    assert block.seen == [False, True] * 3


def test_second_run_starts_from_what_the_first_one_found():
    """A block that changes what it reads: the second run must not see the change."""

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.array(3.0)
            self.step = 0
            self.first = True
            self.table = None

        def __call__(self, x):
            scale = 1.0 if self.first else 100.0
            self.first = False
            self.step += 1
            if self.table is None:
                self.table = mx.array([10.0])
            return x * x * self.weight * scale * self.step * self.table

    gradients = []
    for wrap in (lambda block: block, mt.checkpoint):
        block = wrap(Switching())
        gradients.append(mx.grad(lambda x, block=block: block(x).sum())(mx.array([2.0])).item())
        assert block.table.item() == 10.0
        assert block.first is False
    assert gradients == [120.0, 120.0]


def test_written_values_carry_gradients():
    """What one block writes and the loss reads, such as an auxiliary loss."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.parts = {"deep": [None]}

        def __call__(self, x):
            y = self.inner(x)
            self.auxiliary = mx.square(y).mean()
            self.parts["deep"] = [y * 3, {"last": mx.sin(y)}]
            return mx.tanh(y)

    gradients = []
    for wrap in (False, True):
        mx.random.seed(0)
        block = Router()
        if wrap:
            mt.checkpoint(block)

        def loss(x, block=block):
            y = block(x)
            first, rest = block.parts["deep"]
            return y.sum() + block.auxiliary + first.sum() + rest["last"].sum()

        gradients.append(nn.value_and_grad(block, loss)(mx.ones((2, 4)))[1]["inner"]["weight"])
    assert mx.allclose(*gradients, rtol=1e-6, atol=0)


def test_nothing_is_held_when_the_gradients_are_dropped():
    """Evaluate the loss alone: what the gradient would have needed goes with it (mx.checkpoint holds on to it)."""

    def held_bytes(wrap):
        mx.random.seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(4)))
        mx.eval(model.parameters())
        for layer in model.layers:
            wrap(layer)
        x = mx.random.normal((512, 256))
        mx.eval(x)
        before = mx.get_active_memory()
        value, gradient = nn.value_and_grad(model, lambda x: model(x).square().mean())(x)
        mx.eval(value)
        del value, gradient
        return mx.get_active_memory() - before

    plain, ours = held_bytes(lambda layer: layer), held_bytes(mt.checkpoint)
    assert ours <= plain + 1024
    assert held_bytes(bare_checkpoint) > ours + 512 * 256 * 4


class Remembering(nn.Module):
    """A block that writes into what it is given, as attention writes into a key/value cache."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(256, 256)

    def __call__(self, x, memory):
        y = mx.tanh(self.inner(x))
        if isinstance(memory, list):
            memory.append(y + 1)
        elif isinstance(memory, dict):
            memory["last"] = y + 1
        else:
            memory.last = y + 1
        return y * 2


@pytest.mark.parametrize("memory", [list, dict, SimpleNamespace])
@pytest.mark.parametrize("differentiated", [False, True])
def test_what_a_block_wrote_goes_with_the_model_though_nobody_evaluated_it(memory, differentiated):
    """The graph of what was written holds the call, and the call must not hold what holds the graph."""

    def held_bytes(wrap):
        gc.collect()
        before = mx.get_active_memory()
        model = wrap(Remembering())
        mx.eval(model.parameters())
        written, x = memory(), mx.ones((4, 256))
        if differentiated:
            mx.eval(nn.value_and_grad(model, lambda model, x: model(x, written).sum())(model, x))
        else:
            mx.eval(model(x, written))
        del model, x
        written = None
        gc.collect()
        return mx.get_active_memory() - before

    plain = held_bytes(lambda block: block)
    assert held_bytes(mt.checkpoint) <= plain + 1024


NUMBER = 0
LAST = None


def test_numbers_and_arrays_among_globals_are_apart():
    """A counter that the code assigns is there for both runs, an array is the first run's."""

    def block(x):
        global NUMBER, LAST
        NUMBER += 1
        LAST = x * NUMBER
        return x * NUMBER

    global NUMBER, LAST
    NUMBER, LAST = 0, None

    def loss(x):
        return mt.checkpoint(block)(x).sum() + 10 * LAST.sum()

    assert mx.grad(loss)(mx.array([2.0])).item() == 11.0, "the second run counted from where the first one did"
    assert NUMBER == 2


class Numbered(nn.Module):
    """Its class counts for all instances."""

    number = 0

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def __call__(self, x):
        Numbered.number += 1
        return self.inner(x) * Numbered.number


def test_second_run_reads_the_class_as_the_first_one_did():
    gradients = []
    for wrap in (lambda block: block, mt.checkpoint):
        mx.random.seed(0)
        Numbered.number = 0
        blocks = [wrap(Numbered()), wrap(Numbered())]
        gradients.append(mx.grad(lambda x, blocks=blocks: blocks[1](blocks[0](x)).sum())(mx.ones((1, 2))))
    assert mx.array_equal(*gradients)
    assert Numbered.number == 4


def test_a_log_that_the_second_run_begins_is_kept():
    log = defaultdict(list)

    def block(x):
        log["again" if mt.is_recomputing() else "first"].append(x.shape)
        return x * x

    mx.eval(mx.grad(lambda x: mt.checkpoint(block)(x).sum())(mx.ones((2,))))
    assert log == {"first": [(2,)], "again": [(2,)]}


def test_what_the_first_run_kept_for_later_is_made_again_by_the_second():
    """A value that a block computes once and keeps must not be there yet when the block runs again."""

    class Lazy:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, x):
            if not hasattr(self, "scaled"):
                self.scaled = self.weight * 3
            return (x * self.scaled).sum()

    def loss(w, wrap):
        return wrap(Lazy(w))(mx.array([1.0, 2.0]))

    w = mx.array([0.5, 0.25])
    assert mx.grad(lambda w: loss(w, mt.checkpoint))(w).tolist() == [3.0, 6.0]


def test_sets_and_slots_are_written_once():
    class Slotted:
        __slots__ = ("seen", "state")

        def __init__(self):
            self.seen, self.state = 0, None

    held = {Slotted()}

    def block(x):
        for item in held:
            item.state = x if item.state is None else item.state + x
            item.seen += 1
        return x * next(iter(held)).state

    assert mx.grad(lambda x: mt.checkpoint(block)(x).sum())(mx.array([3.0])).item() == 6.0
    item = next(iter(held))
    assert item.state.tolist() == [3.0]
    assert item.seen == 1, "it goes with the array beside it, as a cache's position does"


UNITS = [mx.array([1.0, 2.0])]


class Result:
    """What a block returns; its class holds and names constants that are no result."""

    zero = mx.array([0.0, 0.0])

    def __init__(self, value):
        self.value = value

    def scaled(self):
        return self.value * UNITS[0] + self.zero


def out_of_sight(name):
    return getattr(sys.modules[__name__], name)


def test_constants_behind_a_returned_object_are_no_outputs():
    """Only the object that comes back tells of its class, whose constants must not become the block's results."""
    before = UNITS[0], Result.zero
    block = mt.checkpoint(lambda x: out_of_sight("Res" + "ult")(mx.sin(x)))
    mx.compile(mx.grad(lambda x: block(x).value.sum()))(mx.array([1.0, 2.0]))
    assert UNITS[0] is before[0]
    assert Result.zero is before[1]


TALLY = 0


def count_up(x):
    global TALLY
    TALLY += 1
    return x


def count_up_again(x):
    global TALLY
    TALLY += 1
    return x


def test_a_counter_that_two_functions_write_is_counted_once_for_each():
    global TALLY
    TALLY = 0
    block = mt.checkpoint(lambda x: count_up_again(count_up(x)).sin().sum())
    mx.eval(mx.grad(block)(mx.ones((2,))))
    assert TALLY == 4
