"""One measured trial: what it sees, and what it refuses to take for a measurement."""

import math

import mlx.core as mx
import pytest
import small_steps

from mlx_tune.batching.probe import Probe
from mlx_tune.errors import TrialError
from mlx_tune.measuring.step_outcome import count_items, is_out_of_memory

pytestmark = pytest.mark.usefixtures("quick_garbage")

BUDGET = 16_000_000


def probe(step=None, make_batch=small_steps.make_batch, **options):
    built, _, state = small_steps.build()
    return Probe(step or built, make_batch, state, BUDGET, **options)


def test_peaks_are_those_of_steps_that_ran_under_the_limit():
    trial = probe().trial(2, None, 2)[-1]
    assert trial.fits
    assert 2 * 100 * 256 * 4 < trial.floor_bytes <= trial.peak_bytes <= BUDGET
    assert trial.held_bytes >= trial.floor_bytes
    assert trial.steps == 2
    assert trial.items == 2
    assert trial.items_per_second == pytest.approx(2 / trial.seconds)
    assert trial.footprint_bytes > trial.peak_bytes


def test_first_and_further_steps_are_timed_apart():
    clock = probe()
    [first, *_] = clock.trial(2, None, 2)
    again = clock.trial(2, None, 2)[-1]
    assert first.first_seconds > 0
    assert first.repeated_seconds > 0
    assert again.first_seconds == 0  # it was traced and compiled the time before
    assert again.repeated_seconds > 0


def test_limits_are_put_back():
    limit, cache = mx.set_memory_limit(10**9), mx.set_cache_limit(10**6)
    try:
        probe().trial(1, None, 1)
        assert (mx.set_memory_limit(10**9), mx.set_cache_limit(10**6)) == (10**9, 10**6)
    finally:
        mx.set_memory_limit(limit)
        mx.set_cache_limit(cache)


def test_a_size_above_the_budget_is_seen_not_to_fit():
    trial = probe().trial(20, None, 2)[-1]
    assert not trial.fits
    assert trial.floor_bytes > BUDGET
    assert trial.seconds is None


@pytest.mark.cpu_only
def test_peak_and_cache_stay_within_the_budget_together():
    trial = probe().trial(2, None, 2)[-1]
    assert trial.peak_bytes + trial.cache_limit_bytes <= BUDGET


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (lambda x: None, r"step returned None: it must return arrays, the loss first"),
        (lambda x: {"loss": 1.5}, r"step returned a dict without arrays"),
        (lambda x: x, r"A trial at batch size 1 ran no operation: step\(batch\) returned without computing anything"),
        (lambda x: x.sum() * math.nan, r"The loss at batch size 1 is not finite.*do not diverge"),
        (lambda x: x.sum() * 0, r"The loss at batch size 1 is zero.*mlx#4134"),
    ],
)
def test_a_step_that_proves_nothing_is_refused(step, text):
    with pytest.raises(TrialError, match=text):
        probe(step).trial(1, None, 1)


def test_a_make_batch_that_ignores_its_argument_is_refused():
    measuring = probe(make_batch=lambda n: small_steps.make_batch(2))
    measuring.trial(1, None, 1)
    with pytest.raises(
        TrialError, match=r"make_batch\(1\) and make_batch\(2\) return arrays of the same shapes, \[2, 100, 64\]"
    ):
        measuring.trial(2, None, 1)


def test_a_loss_that_trials_drove_to_zero_is_looked_at_from_the_start():
    restored = []
    left = [0.0]

    def step(x):
        return x.sum() * 0 + left[0]

    def restore():
        restored.append(True)
        left[0] = 3.0

    probe(step, restore=restore).trial(1, None, 1)
    assert restored == [True]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"), True),
        (
            RuntimeError(
                "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size"
            ),
            True,
        ),
        (RuntimeError("[malloc] Unable to allocate 9 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("[matmul] Last dimension of first input"), False),
        (TrialError("ran out of memory"), False),
    ],
)
def test_only_allocators_errors_are_taken_for_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_running_out_of_memory_is_a_trial_that_does_not_fit():
    def step(x):
        raise RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory\n at line 3")

    trial = probe(step).trial(3, 100, 1)[-1]
    assert not trial.fits
    assert trial.reason == "out of memory (cudaMallocAsync(&data, size, stream) failed: out of memory)"


def test_swapping_is_a_reason_not_to_fit(monkeypatch):
    readings = iter([0, 100_000_000])
    monkeypatch.setattr("mlx_tune.devices.swap_used_bytes", lambda: next(readings))
    trial = probe().trial(1, None, 1)[-1]
    assert not trial.fits
    assert trial.reason == "the system swapped 100 MB"


def test_a_little_swapping_may_be_anyones(monkeypatch):
    readings = iter([0, BUDGET])
    monkeypatch.setattr("mlx_tune.devices.swap_used_bytes", lambda: next(readings))
    trial = probe().trial(1, None, 1)[-1]
    assert trial.fits
    assert trial.swapped_bytes == BUDGET


def test_the_steps_own_exceptions_pass():
    def step(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        probe(step).trial(1, None, 1)


def test_tokens_are_counted_where_there_are_some():
    assert count_items((mx.zeros((3, 7), mx.int32), mx.zeros(3)), 3) == (21, "tokens")
    assert count_items(mx.zeros((3, 7)), 3) == (3, "rows")
