"""Which prompts are timed, told from models that say themselves how long they take."""

from __future__ import annotations

import mlx.core as mx
import pytest
from self_timed import Says, believed

from mlx_tune.quantization.judging.timed_runs import measure_after, measure_before
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.sites import WalkedModel


def tokens(length: int = 100) -> Batch:
    array = mx.zeros((2, length), dtype=mx.int32)
    return Batch((array,), array)


@pytest.mark.parametrize(
    ("before", "after", "length", "expected"),
    [
        (0.001, 0.01, 100, 64),
        (0.001, 0.01, 33, 33),
        (0.001, 0.3, 100, 16),  # a prompt of 64 would take 19 seconds
        (0.001, 1.0, 100, 4),
        (0.3, 0.01, 100, 16),  # what was not timed before is not timed after
        (0.001, 60.0, 100, 1),
        (0.001, 0.01, 3, 3),
    ],
)
def test_the_longest_prompt_that_both_take_in_reasonable_time(before, after, length, expected) -> None:
    first = measure_before(WalkedModel(Says(before)), tokens(length), tokens_in=True, timer=believed)
    found = measure_after(WalkedModel(Says(after)), tokens(length), first, timer=believed)
    assert found.before.prefill_tokens == found.after.prefill_tokens == expected
    assert found.before.prefill_seconds == pytest.approx(before * expected)
    assert found.after.prefill_seconds == pytest.approx(after * expected)
    assert (found.before.decode_seconds, found.after.decode_seconds) == (before, after)
    text = str(found)
    assert (f"prefill, {expected} tokens" in text) == (expected > 1)
    assert "decode, one token without context" in text
    assert f"{before / after:.2f}" in text


def test_other_models_are_timed_by_the_batch() -> None:
    batch = Batch((mx.zeros((2, 5)),), None)
    first = measure_before(WalkedModel(Says(1.0)), batch, tokens_in=False, timer=believed)
    found = measure_after(WalkedModel(Says(2.0)), batch, first, timer=believed)
    assert (found.before.prefill_seconds, found.after.prefill_seconds) == (5.0, 10.0)
    assert found.after.decode_seconds is None
    assert "one batch" in str(found)
