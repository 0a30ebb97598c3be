"""Random interleavings of blocks in threads, generators and tasks, over a stand-in for Metal.

The same machine runs against mlx-lm's context and fails: that documents what it is for, and that it can fail.
"""

import asyncio
import contextlib
import gc
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from metal_stand_in import MetalStandIn

import mlx_tune as mt

RECOMMENDED = 10_000
SETTINGS = settings(max_examples=60, stateful_step_count=25, deadline=None, database=None)
BYTES_PER_ARRAY = {"a": 1000, "b": 2000, "shared": 500}
WANTED = {
    "model a": ("a", "shared"),
    "model b": ("b", "shared"),
    "100 bytes": 100,
    "9000 bytes": 9000,
    "everything": None,
}


class BrokenError(Exception):
    """What the user's code raises."""


class Interleavings(RuleBasedStateMachine):
    """Blocks come and go; after every step the limit must be what the rule says."""

    only_models = False

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.metal = MetalStandIn(4 * RECOMMENDED, RECOMMENDED).install(self.patch)
        self.metal.broken_streams.add("broken")
        self.arrays = {name: mx.zeros((size,), dtype=mx.uint8) for name, size in BYTES_PER_ARRAY.items()}
        self.pool = ThreadPoolExecutor(1)
        self.loop = asyncio.new_event_loop()
        self.live = []  # (what is wanted, how to end it)
        self.baseline = 0

    def block(self, name, streams):
        wanted = WANTED[name]
        self.metal.broken_streams.update({"broken"} & set(streams))  # failed work is told once, and there is more of it
        return mt.wired_limit(self.tree(wanted) if isinstance(wanted, tuple) else wanted, "20%", streams)

    def tree(self, names):
        return {name: self.arrays[name] for name in names}

    def expected(self):
        """The rule, in the plainest words."""
        names, total = set(), 0
        for name, _ in self.live:
            wanted = WANTED[name]
            if isinstance(wanted, tuple):
                names |= set(wanted)
            else:
                total += RECOMMENDED if wanted is None else wanted
        total += sum(BYTES_PER_ARRAY[name] * 12 // 10 for name in names)
        return min(RECOMMENDED, max(self.baseline, total)) if self.live else self.baseline

    @initialize(baseline=st.sampled_from([0, 700, 5000, RECOMMENDED]))
    def start(self, baseline):
        self.metal.limit = self.baseline = baseline

    @rule(name=st.sampled_from(sorted(WANTED)), host=st.sampled_from(["here", "thread", "generator", "task"]))
    def enter(self, name, host):
        if self.only_models and not isinstance(WANTED[name], tuple):
            name = "model a"
        self.live.append((name, getattr(self, f"enter_{host}")(name)))

    def enter_here(self, name):
        stack = contextlib.ExitStack()
        stack.enter_context(self.block(name, ()))
        return lambda how: self.end_stack(stack, how)

    def enter_thread(self, name):
        stack = contextlib.ExitStack()
        self.pool.submit(stack.enter_context, self.block(name, ())).result()
        return lambda how: self.pool.submit(self.end_stack, stack, how).result()

    def end_stack(self, stack, how):
        if how == "broken stream":
            stack.push(self.block_with_broken_stream)
        if how == "raise":
            with pytest.raises(BrokenError), stack:
                raise BrokenError
        else:
            stack.close()

    def block_with_broken_stream(self, *_):
        """A neighbour that comes and goes with a device that fails."""
        with contextlib.suppress(RuntimeError), self.block("model a", ["broken"]):
            pass

    def enter_generator(self, name):
        def generate():
            with self.block(name, ()):
                while True:
                    yield

        held = [generate()]
        next(held[0])

        def end(how):
            if how == "raise":
                with pytest.raises(BrokenError):
                    held.pop().throw(BrokenError())
            else:
                held.pop()  # dropped, not closed
                gc.collect(0)

        return end

    def enter_task(self, name):
        entered, over = asyncio.Event(), asyncio.Event()

        async def use(how):
            with self.block(name, ()):
                entered.set()
                await over.wait()
                if how and how[0] == "raise":
                    raise BrokenError

        outcome = []

        async def begin():
            task = asyncio.create_task(use(outcome))
            await entered.wait()
            return task

        task = self.loop.run_until_complete(begin())

        def end(how):
            outcome.append(how)
            if how == "broken stream":
                task.cancel()
            over.set()
            with contextlib.suppress(BrokenError, asyncio.CancelledError):
                self.loop.run_until_complete(task)

        return end

    @rule(which=st.integers(0, 100), how=st.sampled_from(["return", "raise", "broken stream"]))
    def leave(self, which, how):
        if self.live:
            self.live.pop(which % len(self.live))[1](how)

    @invariant()
    def the_limit_follows_the_rule(self):
        assert self.metal.limit == self.expected()

    def teardown(self):
        try:
            while self.live:
                self.live.pop(0)[1]("return")
            assert self.metal.limit == self.baseline
        finally:
            self.pool.shutdown()
            self.loop.close()
            self.patch.undo()


class MlxLm(Interleavings):
    """The same, over mlx-lm's context: while any block is live, it means to wire all that is recommended."""

    only_models = True

    def block(self, name, streams):
        from mlx_lm.generate import wired_limit

        return wired_limit(self.tree(WANTED[name]), list(streams))

    def expected(self):
        return RECOMMENDED if self.live else self.baseline


def test_the_limit_always_follows_the_rule_and_the_baseline_returns():
    run_state_machine_as_test(Interleavings, settings=SETTINGS)


def test_the_same_machine_finds_the_leaks_of_mlx_lms_context():
    quick = settings(SETTINGS, phases=[Phase.generate], report_multiple_bugs=False, print_blob=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(MlxLm, settings=quick)


def test_mlx_lms_context_unwires_its_neighbour_and_then_leaks(metal):
    from mlx_lm.generate import wired_limit

    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(wired_limit({"weight": mx.zeros(10)}))
    second.enter_context(wired_limit({"weight": mx.zeros(10)}))
    first.close()
    assert metal.limit == 0  # the second is still at work
    second.close()
    assert metal.limit == metal.recommended_bytes  # and nobody is, now


def test_mlx_lms_context_leaks_and_hides_the_users_exception_when_a_stream_fails(metal):
    from mlx_lm.generate import wired_limit

    metal.broken_streams.add("broken")
    with pytest.raises(RuntimeError, match="Command buffer"), wired_limit({"weight": mx.zeros(10)}, ["broken"]):
        raise KeyError("mine")
    assert metal.limit == metal.recommended_bytes


def test_mlx_lms_context_inside_this_one_does_no_harm(metal):
    from mlx_lm.generate import wired_limit

    with mt.wired_limit(100):
        with wired_limit({"weight": mx.zeros(10)}):
            assert metal.limit == metal.recommended_bytes
        assert metal.limit == 100
    assert metal.limit == 0
