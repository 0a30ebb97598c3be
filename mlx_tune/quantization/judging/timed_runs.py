"""Runs of a model, timed on this machine before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_tune import devices
from mlx_tune.quantization.judging.speed import Speed, SpeedComparison
from mlx_tune.quantization.models.answers import tree_of
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.sites import WalkedModel

#: Tokens of the prompt: the longest that can be timed within reason before and after.
_PROMPT_TOKENS = (64, 16, 4)

#: Seconds that one kind of measurement goes on for, and that a single run of a prompt may take.
_SECONDS, _PATIENCE = 1.0, 10.0

#: The seconds that a call takes.
Timer = Callable[[Callable[[], object]], float]


def median_seconds(run: Callable[[], object]) -> float:
    """The median of up to nine runs within a second, after one to warm up; that one where it took longer than that."""
    times: list[float] = []
    started = time.perf_counter()
    _finish(run())
    if (first := time.perf_counter() - started) > _SECONDS:
        return first
    while len(times) < 9 and (not times or time.perf_counter() - started < _SECONDS):
        begin = time.perf_counter()
        _finish(run())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_before(
    model: WalkedModel,
    batch: Batch,
    *,
    tokens_in: bool,
    loss: Callable[..., object] | None = None,
    timer: Timer = median_seconds,
) -> list[Speed]:
    """Time the unquantized model with its weights as they are stored.

    Args:
        model: Any model.
        batch: The arguments of its call.
        tokens_in: True where it predicts tokens, so that a prompt and a single token are timed apart.
        loss: The function to time instead of the model alone, called with the model and the batch.
        timer: Says what a call takes, in seconds.

    Returns:
        For models that are called with tokens one measurement for each length of the prompt, the longest first, as it
        is not known yet which of them the quantized model can take: on a CPU it may be many times slower.
    """
    with model.evaluation_mode():
        if loss is not None:
            return [Speed(None, timer(lambda: batch.call(loss, model.model)), None)]
        if not tokens_in:
            return [Speed(None, timer(lambda: batch.call(model.model)), None)]
        assert batch.tokens is not None
        lengths = sorted({min(n, batch.tokens.shape[1]) for n in _PROMPT_TOKENS}, reverse=True)
        return _with_prompts(model.model, batch.tokens, lengths, timer, every=True)


def measure_after(
    model: WalkedModel,
    batch: Batch,
    before: list[Speed],
    *,
    loss: Callable[..., object] | None = None,
    timer: Timer = median_seconds,
) -> SpeedComparison:
    """Time the quantized model likewise, with the longest prompt that it takes in reasonable time.

    Args:
        model: The quantized model.
        batch: As before.
        before: The result of `measure_before`.
        loss: As before.
        timer: As for `measure_before`.
    """
    lengths = [speed.prefill_tokens for speed in before if speed.prefill_tokens is not None]
    with model.evaluation_mode():
        if lengths:
            assert batch.tokens is not None
            after = _with_prompts(model.model, batch.tokens, lengths, timer, every=False)[0]
        else:
            run = (lambda: batch.call(model.model)) if loss is None else (lambda: batch.call(loss, model.model))
            after = Speed(None, timer(run), None)
    same = next(speed for speed in before if speed.prefill_tokens == after.prefill_tokens)
    return SpeedComparison(same, after, devices.machine().name)


def _with_prompts(model: nn.Module, tokens: mx.array, lengths: list[int], timer: Timer, *, every: bool) -> list[Speed]:
    """Times for prompts of these lengths, or the first of them, that a token at a time would take within reason."""
    one = timer(lambda: model(tokens[:1, :1]))
    found: list[Speed] = []
    for length in lengths:
        if length > 1 and one * length <= _PATIENCE and (every or not found):
            prompt = tokens[:1, :length]
            found.append(Speed(length, timer(partial(model, prompt)), one))
    return [*found, Speed(1, one, one)]


def _finish(output: object) -> None:
    mx.eval(tree_of(output))
    mx.synchronize()
