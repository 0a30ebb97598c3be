"""The differences between two models' answers: logits and outputs in, figures out."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.judging.statistics import OutputFigures, TokenFigures
from mlx_tune.units import number

#: Logits looked at together: float32 temporaries several times this size come and go.
LOGITS_AT_ONCE = 1 << 24


def compare_outputs(before: list[mx.array], after: list[mx.array]) -> OutputFigures:
    """Sums over the numbers that are finite in both models' outputs.

    Raises:
        QuantizationError: The outputs have different shapes.
    """
    if [a.shape for a in before] != [a.shape for a in after]:
        raise QuantizationError(
            f"The models' outputs differ in shape: {[a.shape for a in before]} and {[a.shape for a in after]}."
        )
    sums, values, lost = [0.0] * 4, 0, 0
    for x, y in zip(before, after, strict=True):
        finite = mx.isfinite(x) & mx.isfinite(y)
        x, y = mx.where(finite, x, 0), mx.where(finite, y, 0)
        found = [(x * y).sum(), mx.square(x).sum(), mx.square(y).sum(), mx.square(x - y).sum()]
        sums = [s + number(f) for s, f in zip(sums, found, strict=True)]
        here = int(number(finite.sum()))
        values, lost = values + here, lost + x.size - here
    return OutputFigures(sums[0], sums[1], sums[2], sums[3], values, lost)


def compare_tokens(before: mx.array, after: mx.array, targets: mx.array, first_sequence: int) -> TokenFigures:
    """Divergences, agreement and likelihoods of every token.

    Args:
        before: The reference's logits [batch, length, vocabulary].
        after: The model's.
        targets: The tokens that came [batch, length].
        first_sequence: The number of the first row.

    Raises:
        QuantizationError: The vocabularies differ.
    """
    import numpy as np

    if before.shape != after.shape:
        raise QuantizationError(
            f"The models' logits differ in shape: {before.shape} and {after.shape}. Both must have one vocabulary."
        )
    batch, length, vocabulary = before.shape
    step = max(1, LOGITS_AT_ONCE // 4 // vocabulary)
    x, y = before.reshape(-1, vocabulary), after.reshape(-1, vocabulary)
    wanted = targets.reshape(-1)
    columns: list[list[Any]] = [[] for _ in range(7)]
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        found = _token_figures(x[part].astype(mx.float32), y[part].astype(mx.float32), wanted[part])
        mx.eval(found)
        for column, values in zip(columns, found, strict=True):
            column.append(np.array(values.astype(mx.float32), dtype=np.float64))
    sequence = np.repeat(np.arange(first_sequence, first_sequence + batch), length)
    figures: list[Any] = [*(np.concatenate(c) for c in columns), sequence]
    return TokenFigures(*figures)


def quick_divergences(before: mx.array, shares: mx.array, after: mx.array) -> mx.array:
    """The KL divergence of every token and nothing else, in a tenth of the time that all figures take on a CPU.

    Args:
        before: The reference's logits [batch, length, vocabulary], float32.
        shares: Their softmax.
        after: The model's, float32.

    Returns:
        float32 `[batch x length]`, with NaN or infinity where this cannot tell: where a logit is no number, where the
        reference gives a token no chance at all, or where both are so far apart that `exp` leaves float32's range.
    """
    vocabulary = before.shape[-1]
    step = max(1, LOGITS_AT_ONCE // 4 // vocabulary)
    rows = [a.reshape(-1, vocabulary) for a in (before, shares, after)]
    found = []
    for start in range(0, rows[0].shape[0], step):
        x, p, y = (a[start : start + step] for a in rows)
        d = x - y
        # As in `_divergence`, with t's sign turned; what either softmax is divided by moves the mean alone.
        t = (p * d).sum(axis=-1, keepdims=True) - d
        terms = mx.where(p > 0, p * (mx.expm1(t) - t), float("nan"))
        found.append(mx.log1p(terms.sum(axis=-1)))
        mx.eval(found[-1])
    return mx.concatenate(found)


def join_figures(parts: list[TokenFigures]) -> TokenFigures:
    """The figures of several batches, one after the other."""
    import numpy as np

    names = ("kl", "reverse_kl", "same_top", "nll_before", "nll_after", "confidence", "finite", "sequence")
    return TokenFigures(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _token_figures(x: mx.array, y: mx.array, targets: mx.array) -> list[mx.array]:
    # Minus infinity is a masked token, and no fault; NaN and plus infinity are.
    finite = ~((mx.isnan(x) | mx.isposinf(x)) | (mx.isnan(y) | mx.isposinf(y))).any(axis=-1)
    x, y = x - mx.logsumexp(x, axis=-1, keepdims=True), y - mx.logsumexp(y, axis=-1, keepdims=True)
    same = x.argmax(axis=-1) == y.argmax(axis=-1)
    at = targets[:, None].astype(mx.int32)
    before = -mx.take_along_axis(x, at, axis=-1)[:, 0]
    after = -mx.take_along_axis(y, at, axis=-1)[:, 0]
    return [_divergence(x, y), _divergence(y, x), same, before, after, mx.exp(x).max(axis=-1), finite]


def _divergence(x: mx.array, y: mx.array) -> mx.array:
    """KL divergence of y from x, both logarithms of probabilities, along the last axis.

    The sum of p (x - y) cancels where both are close: over 150,000 tokens float32 then leaves errors of 1e-5. With
    d = x - y, m its mean under p, and t = d - m, the divergence is log E[exp(-t)] as well, and E[t] is zero: so it is
    log(1 + E[exp(-t) - 1 + t]), in which every term is positive and of second order.
    """
    p = mx.exp(x)
    p = p / p.sum(axis=-1, keepdims=True)
    there = p > 0
    d = mx.where(there, x - y, 0)
    mean = (p * d).sum(axis=-1, keepdims=True)
    t = d - mean
    close = p * (mx.expm1(-t) + t)
    far = mx.exp(y + mean) - mx.where(there, p * (1 - t), 0)
    terms = mx.where(there & (mx.abs(t) < 1), close, far)
    return mx.where(mean[..., 0] > 1, mean[..., 0], mx.log1p(mx.maximum(terms.sum(axis=-1), 0)))
