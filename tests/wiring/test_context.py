import asyncio
import contextlib
import gc
import threading
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from metal_stand_in import GIB, MetalStandIn

import mlx_tune as mt
from mlx_tune.wiring import context


class Sized:
    """A model of a given size that takes no memory: nothing is evaluated."""

    def __init__(self, size: int) -> None:
        self.weight = mx.zeros((size // 2**20, 2**20), dtype=mx.uint8)

    def parameters(self):
        return {"weight": self.weight}


def linear(size: int = 10) -> nn.Module:
    return nn.Linear(size, size, bias=False)


def test_a_model_is_wired_with_its_headroom_and_unwired(metal):
    with mt.wired_limit(linear()) as wired:
        assert wired.applied
        assert wired.limit_bytes == metal.limit == 480
        assert wired.reason == ""
    assert metal.limit == 0


def test_tied_parameters_count_once(metal):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Linear(10, 10, bias=False)
            self.head = nn.Linear(10, 10, bias=False)
            self.head.weight = self.embedding.weight

    with mt.wired_limit(Tied(), headroom=0) as wired:
        assert wired.limit_bytes == 400


def test_an_optimizers_state_counts(metal):
    model, optimizer = linear(), optim.Adam(learning_rate=1e-3)
    optimizer.init(model.trainable_parameters())
    with mt.wired_limit([model, optimizer], headroom=0) as wired:
        scalars = optimizer.state["step"].nbytes + optimizer.state["learning_rate"].nbytes
        assert wired.limit_bytes == 3 * 400 + scalars


def test_models_that_share_arrays_count_them_once(metal):
    first, second = linear(), linear()
    with mt.wired_limit([first, second], headroom=0), mt.wired_limit(second, headroom=0) as wired:
        assert wired.limit_bytes == 800


def test_an_array_that_is_gone_is_not_mistaken_for_a_new_one(metal):
    model = linear()
    with mt.wired_limit(model, headroom=0):
        for _ in range(20):
            model.weight = mx.zeros((10, 10))  # what a training step does
            with mt.wired_limit(model, headroom=0) as wired:
                assert wired.limit_bytes == 800


@pytest.mark.parametrize(
    ("wanted", "limit"),
    [(123, 123), ("24GB", 24_000_000_000), (None, 48 * GIB), (60 * GIB, 48 * GIB), (0, 0)],
)
def test_bytes_text_and_none(metal, wanted, limit):
    with mt.wired_limit(wanted) as wired:
        assert wired.applied
        assert wired.limit_bytes == metal.limit == limit
    assert metal.limit == 0


@pytest.mark.parametrize("wanted", ["much", -1, True, 1.5, float("nan"), nn.ReLU(), {}, [], object(), "12 parsecs"])
def test_what_is_no_model_and_no_size_is_refused_before_anything_is_set(metal, wanted):
    with pytest.raises(mt.InvalidArgumentError):
        mt.wired_limit(wanted)
    assert metal.calls == []


@pytest.mark.parametrize("headroom", ["-5%", 1.5, "plenty"])
def test_a_headroom_that_is_no_share_is_refused(metal, headroom):
    with pytest.raises(mt.InvalidArgumentError, match="give a number from 0 to 1"):
        mt.wired_limit(linear(), headroom=headroom)


def test_without_metal_the_block_runs_and_the_reason_is_given(monkeypatch):
    calls = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: calls.append(limit))
    with mt.wired_limit("24GB") as wired:
        assert not wired.applied
        assert wired.limit_bytes == 0
        assert "nothing to wire" in wired.reason
        assert str(wired) == f"not wired: {wired.reason}"
    assert calls == []


@pytest.mark.parametrize(("version", "applied"), [("14.7.1", False), ("15.0", True), ("26.1", True), ("", True)])
def test_the_version_of_macos_narrows_it_only_where_there_is_one(metal, monkeypatch, version, applied):
    monkeypatch.setattr("platform.mac_ver", lambda: (version, ("", "", ""), ""))
    with mt.wired_limit(linear()) as wired:
        assert wired.applied is applied
        assert applied or "macOS 14.7.1 stores the limit and wires nothing" in wired.reason


def test_a_device_that_recommends_nothing_is_skipped(metal, monkeypatch):
    monkeypatch.setattr(mx, "device_info", dict)
    with mt.wired_limit(100) as wired:
        assert not wired.applied
        assert "reports no recommended working set" in wired.reason


def test_a_session_that_gets_no_device_is_skipped(metal, monkeypatch):
    def no_device():
        raise RuntimeError("[metal::load_device] No Metal device available.")

    monkeypatch.setattr(mx, "device_info", no_device)
    with mt.wired_limit(100) as wired:
        assert not wired.applied
        assert wired.reason == ("Metal gives this session no device: [metal::load_device] No Metal device available.")
    assert metal.limits == []


@pytest.mark.parametrize(("value", "applied"), [("1", False), ("yes", False), ("0", True), ("", True)])
def test_the_environment_turns_it_off(metal, monkeypatch, value, applied):
    monkeypatch.setenv("MLX_TUNE_NO_WIRING", value)
    with mt.wired_limit(linear()) as wired:
        assert wired.applied is applied
        assert applied or "MLX_TUNE_NO_WIRING" in wired.reason


def test_a_refusal_of_the_backend_is_a_warning_and_a_reason(metal):
    metal.refuse_above = 10
    with contextlib.ExitStack() as stack:
        with pytest.warns(RuntimeWarning, match="refused by the stand-in"):
            wired = stack.enter_context(mt.wired_limit(100))
        assert not wired.applied
        assert "refused by the stand-in" in wired.reason
    assert metal.limit == 0


def test_given_streams_are_synchronized_before_the_limit_falls(metal):
    with mt.wired_limit(100, streams=["one", "two"]):
        metal.calls.clear()
    assert metal.calls == [("synchronize", "one"), ("synchronize", "two"), ("set", 0)]


def test_the_cache_is_cleared_before_the_limit_rises(metal):
    with mt.wired_limit(100):
        assert metal.calls == [("clear", None), ("set", 100)]


def test_a_failing_synchronize_restores_and_is_raised(metal):
    metal.broken_streams.add("broken")
    with pytest.raises(RuntimeError, match="Command buffer"), mt.wired_limit(100, streams=["broken"]):
        assert metal.limit == 100
    assert metal.limit == 0


def test_a_failing_stream_does_not_keep_the_others_from_being_waited_for(metal):
    metal.broken_streams.add("broken")
    with pytest.raises(RuntimeError, match="Command buffer"), mt.wired_limit(100, streams=["broken", "sound"]):
        metal.calls.clear()
    assert metal.calls == [("synchronize", "broken"), ("synchronize", "sound"), ("set", 0)]


def test_an_interrupted_synchronize_restores_too(metal, monkeypatch):
    def interrupted(stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "synchronize", interrupted)
    block = mt.wired_limit(100, streams=["one"])
    with pytest.raises(KeyboardInterrupt), block:
        assert metal.limit == 100
    assert metal.limit == 0  # although the block is still referred to


def test_an_entry_that_wires_nothing_takes_no_other_with_it(metal, monkeypatch):
    block = mt.wired_limit(100)
    with block:
        monkeypatch.setenv("MLX_TUNE_NO_WIRING", "1")
        with block:
            assert metal.limit == 100
        assert metal.limit == 100
    assert metal.limit == 0


def test_a_failing_synchronize_never_hides_the_users_exception(metal):
    metal.broken_streams.add("broken")
    with pytest.raises(KeyError, match="mine") as caught, mt.wired_limit(100, streams=["broken"]):
        raise KeyError("mine")
    assert metal.limit == 0
    assert "Command buffer execution failed" in caught.value.__notes__[0]


def test_a_failing_restore_never_hides_the_users_exception(metal):
    def use():
        with mt.wired_limit(100):
            metal.refuse_above = -1
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        use()
    assert "refused by the stand-in" in caught.value.__notes__[0]
    metal.refuse_above = None
    with mt.wired_limit(50):  # the next block puts things right
        pass
    assert metal.limit == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_blocks_end_in_any_order(metal, order):
    metal.limit = 7
    sizes = [10, 20, 40]
    stacks = [contextlib.ExitStack() for _ in sizes]
    for stack, size in zip(stacks, sizes, strict=True):
        stack.enter_context(mt.wired_limit(size))
    left = sum(sizes)
    for index in order:
        assert metal.limit == left
        stacks[index].close()
        left -= sizes[index]
    assert metal.limit == 7


def test_one_object_may_be_used_again_and_inside_itself(metal):
    block = mt.wired_limit(100)
    with block:
        with block:
            assert metal.limit == 200
        assert metal.limit == 100
    with block:
        assert metal.limit == 100
    assert metal.limit == 0


def test_a_dropped_generator_leaves(metal):
    def generate():
        with mt.wired_limit(100):
            yield metal.limit

    generator = generate()
    assert next(generator) == 100
    del generator
    gc.collect()
    assert metal.limit == 0


def test_a_block_that_was_entered_by_hand_and_dropped_leaves(metal):
    block = mt.wired_limit(100)
    block.__enter__()
    assert metal.limit == 100
    del block
    gc.collect()
    assert metal.limit == 0


def test_tasks_interleave(metal):
    async def use(size, first, second):
        with mt.wired_limit(size):
            first.set()
            await second.wait()

    async def main():
        started, ended = [asyncio.Event() for _ in range(2)], [asyncio.Event() for _ in range(2)]
        tasks = [asyncio.create_task(use(10 * (i + 1), started[i], ended[i])) for i in range(2)]
        for event in started:
            await event.wait()
        assert metal.limit == 30
        ended[0].set()
        await tasks[0]
        assert metal.limit == 20
        tasks[1].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[1]

    asyncio.run(main())
    assert metal.limit == 0


def test_a_block_may_end_in_another_thread(metal):
    stack = contextlib.ExitStack()
    stack.enter_context(mt.wired_limit(100))
    thread = threading.Thread(target=stack.close)
    thread.start()
    thread.join()
    assert metal.limit == 0


def test_as_a_decorator_of_a_function(metal):
    @mt.wired_limit(100)
    def depth(n):
        """Recurses."""
        return [metal.limit] + (depth(n - 1) if n else [])

    assert depth.__doc__ == "Recurses."
    assert depth(2) == [100, 200, 300]
    assert metal.limit == 0


def test_as_a_decorator_of_a_generator_it_holds_until_the_end(metal):
    @mt.wired_limit(100)
    def count():
        received = yield metal.limit
        yield received
        return "done"

    generator = count()
    assert metal.limit == 0
    assert next(generator) == 100
    assert generator.send("hello") == "hello"
    with pytest.raises(StopIteration, match="done"):
        next(generator)
    assert metal.limit == 0


def test_as_a_decorator_of_coroutines_and_async_generators(metal):
    @mt.wired_limit(100)
    async def one():
        await asyncio.sleep(0)
        return metal.limit

    @mt.wired_limit(50)
    async def many():
        yield metal.limit
        yield metal.limit

    async def main():
        return await one(), [limit async for limit in many()]

    assert asyncio.run(main()) == (100, [50, 50])
    assert metal.limit == 0


def test_a_decorated_async_generator_is_sent_to_thrown_at_and_closed_as_it_was(metal):
    events = []

    @mt.wired_limit(100)
    async def talk():
        try:
            events.append((yield 1))
            try:
                yield 2
            except KeyError:
                events.append("caught")
            yield metal.limit
        finally:
            events.append("closed")

    async def main():
        items = talk()
        assert await anext(items) == 1
        assert await items.asend("hello") == 2
        assert await items.athrow(KeyError()) == 100
        await items.aclose()
        assert events == ["hello", "caught", "closed"]
        assert metal.limit == 0

    asyncio.run(main())


def test_a_model_close_to_the_limit_warns_with_the_line_that_helps(monkeypatch):
    metal = MetalStandIn(32 * GIB, 21 * GIB).install(monkeypatch)
    block = mt.wired_limit(Sized(20 * GIB))
    line = r"`sudo sysctl iogpu\.wired_limit_mb=24576`, which leaves the system 8\.59 GB"
    with pytest.warns(UserWarning, match=line):
        block.__enter__()
    assert block.applied
    assert metal.limit == 21 * GIB
    block.__exit__(None, None, None)
    assert metal.limit == 0


def test_where_raising_would_not_help_it_says_so(monkeypatch):
    MetalStandIn(64 * GIB, 48 * GIB).install(monkeypatch)
    with pytest.warns(UserWarning, match=r"wired_limit_mb=49152` would not raise it"), mt.wired_limit(Sized(46 * GIB)):
        pass


def test_a_model_with_a_tenth_to_spare_does_not_warn(metal):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mt.wired_limit(Sized(43 * GIB)) as wired:
            assert wired.applied


def test_a_warning_that_is_an_error_leaves_nothing_behind(metal):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="close to"):
            mt.wired_limit(Sized(47 * GIB)).__enter__()
    assert metal.limit == 0


def test_a_warning_points_at_the_line_that_asked(metal):
    big = Sized(47 * GIB)

    @mt.wired_limit(big)
    def decorated():
        pass

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mt.wired_limit(big):
            pass
        decorated()
    assert [warning.filename for warning in caught] == [__file__, __file__]


def test_an_interrupt_while_entering_leaves_nothing_behind(metal, monkeypatch):
    plain_enter = context.registry.enter

    def interrupted(*args):
        plain_enter(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(context.registry, "enter", interrupted)
    block = mt.wired_limit(100)
    with pytest.raises(KeyboardInterrupt):
        block.__enter__()
    assert 100 in metal.limits
    assert metal.limit == 0  # although the block is still referred to
    assert context.registry.live == 0


def test_wiring_under_a_tight_memory_limit_warns(metal):
    with (
        mt.memory_limit("10GB"),
        pytest.warns(UserWarning, match=r"10\.0 GB leaves little slack above 9\.00 GB.*mlx#3186.*11\.2 GB"),
        mt.wired_limit("9GB"),
    ):
        pass


def test_a_tight_memory_limit_under_wiring_warns_and_may_be_an_error(metal):
    before = mx.get_memory_limit()
    with mt.wired_limit("9GB"):
        with pytest.warns(UserWarning, match=r"mlx#3186"), mt.memory_limit("10GB"):
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=r"mlx#3186"):
                mt.memory_limit("10GB").__enter__()
        assert mx.get_memory_limit() == before


def test_a_memory_limit_with_slack_is_silent(metal):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mt.memory_limit("12GB"), mt.wired_limit("9GB"), mt.memory_limit("13GB"):
            assert metal.limit == 9_000_000_000


def test_what_it_prints_and_hands_to_programs(metal):
    block = mt.wired_limit("9GB")
    assert str(block) == "not wired: not entered yet"
    with block:
        assert str(block) == "9.00 GB wired, the limit is 9.00 GB"
        assert block.to_dict() == {
            "applied": True,
            "limit_bytes": 9_000_000_000,
            "requested_bytes": 9_000_000_000,
            "reason": "",
        }
