"""From figures measured token by token, or batch by batch, to what a report says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mlx_tune.quantization.judging.accuracy import LanguageAccuracy, LossAccuracy, OutputAccuracy
from mlx_tune.quantization.judging.statistics import (
    OutputFigures,
    TokenFigures,
    by_confidence,
    clustered_mean,
    exponential,
)
from mlx_tune.units import format_percent

if TYPE_CHECKING:
    pass


def summarise_tokens(figures: TokenFigures, **context: Any) -> LanguageAccuracy:
    """Statistics of figures measured token by token.

    Args:
        figures: The figures.
        context: Further fields of `LanguageAccuracy`.
    """
    import numpy as np

    use = figures.usable
    kl, sequence = figures.kl[use], figures.sequence[use]
    before, after, top = figures.nll_before[use], figures.nll_after[use], figures.same_top[use]
    mean, reverse = clustered_mean(kl, sequence), clustered_mean(figures.reverse_kl[use], sequence)
    same = clustered_mean(top, sequence)
    first, second = (exponential(clustered_mean(x, sequence)) for x in (before, after))
    ratio = exponential(clustered_mean(after - before, sequence))
    tails = [float(x) for x in np.quantile(kl, [0.5, 0.99, 0.999, 1.0])] if kl.size else [math.nan] * 4
    moved = float(np.sqrt(np.mean((np.exp(-after) - np.exp(-before)) ** 2))) if kl.size else math.nan
    non_finite = 1 - float(np.count_nonzero(use)) / max(1, use.size)
    warnings = tuple(context.pop("warnings", ()))
    if non_finite:
        warnings += (f"{format_percent(non_finite, 2)} of tokens got NaN or infinite logits and are left out.",)
    return LanguageAccuracy(
        tokens=int(kl.size),
        sequences=int(np.unique(sequence).size),
        mean_kl=mean.mean,
        mean_kl_error=mean.error,
        median_kl=tails[0],
        p99_kl=tails[1],
        p999_kl=tails[2],
        max_kl=tails[3],
        reverse_kl=reverse.mean,
        reverse_kl_error=reverse.error,
        same_top=same.mean,
        same_top_error=same.error,
        perplexity_before=first.mean,
        perplexity_before_error=first.error,
        perplexity_after=second.mean,
        perplexity_after_error=second.error,
        perplexity_ratio=ratio.mean,
        perplexity_ratio_error=ratio.error,
        probability_change=moved,
        non_finite=non_finite,
        buckets=by_confidence(figures.confidence[use], kl, top),
        warnings=warnings,
        **context,
    )


def summarise_losses(before: list[float], after: list[float], **context: Any) -> LossAccuracy:
    """Statistics of a loss measured batch by batch, on both models."""
    import numpy as np

    x, y = np.array(before, dtype=np.float64), np.array(after, dtype=np.float64)
    use = np.isfinite(x) & np.isfinite(y)
    x, y = x[use], y[use]
    batches = np.arange(x.size)
    first, second, change = (clustered_mean(v, batches) for v in (x, y, y - x))
    non_finite = 1 - x.size / max(1, use.size)
    warnings = tuple(context.pop("warnings", ()))
    if non_finite:
        warnings += (f"{format_percent(non_finite)} of the batches have a NaN or infinite loss and are left out.",)
    return LossAccuracy(
        batches=int(x.size),
        loss_before=first.mean,
        loss_before_error=first.error,
        loss_after=second.mean,
        loss_after_error=second.error,
        loss_change=change.mean,
        loss_change_error=change.error,
        non_finite=non_finite,
        warnings=warnings,
        **context,
    )


def summarise_outputs(figures: list[OutputFigures], **context: Any) -> OutputAccuracy:
    """Statistics of outputs compared batch by batch."""
    errors = [_ratio(math.sqrt(f.difference), math.sqrt(f.before)) for f in figures]
    cosines = [_ratio(f.product, math.sqrt(f.before) * math.sqrt(f.after), same=1.0) for f in figures]
    whole = _ratio(math.sqrt(sum(f.difference for f in figures)), math.sqrt(sum(f.before for f in figures)))
    values, lost = sum(f.values for f in figures), sum(f.non_finite for f in figures)
    warnings = tuple(context.pop("warnings", ()))
    share = lost / max(1, values + lost)
    if lost:
        warnings += (f"{format_percent(share, 2)} of the outputs are NaN or infinite and are left out.",)
    return OutputAccuracy(
        batches=len(figures),
        values=values,
        relative_error=whole,
        worst_relative_error=max(errors),
        cosine=sum(cosines) / len(cosines),
        worst_cosine=min(cosines),
        non_finite=share,
        warnings=warnings,
        **context,
    )


def _ratio(part: float, whole: float, same: float = 0.0) -> float:
    """A quotient; of nothing to nothing, what two equal outputs would give."""
    if whole:
        return part / whole
    return same if not part else math.inf
