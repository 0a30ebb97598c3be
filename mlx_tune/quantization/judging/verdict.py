"""The verdict of a report: one sentence in words, with the figure behind it.

A mean KL divergence of d nats a token says how soon text of the original gives the other model away: the odds between
the two grow by e ** d with every token, so that odds of 20 to 1 take ln(20) / d tokens on average. Below what rounding
in half precision does by itself, nothing tells them apart that is not also there without quantization.
"""

from __future__ import annotations

import math

from mlx_tune.units import format_count, format_percent

#: Where there is no noise floor: as much as half precision moved the models that it was measured on.
_FLOOR = 0.001

#: Mean KL divergences up to which a verdict holds, each ten times the last: text of the original gives the other model
#: away, at odds of 20 to 1, after about 300 tokens, a page; 30, a sentence; 3.
_LANGUAGE = ((0.01, "very close to the original"), (0.1, "close to the original"), (1.0, "clearly worse"))

#: Relative errors of outputs: that of half precision, 2**-8; a hundredth and a quarter of the outputs' power.
_OUTPUTS = ((2.0**-8, "as close as half precision"), (0.1, "close to the original"), (0.5, "clearly different"))

_BROKEN = "broken"


def verdict_on_tokens(
    mean_kl: float,
    error: float,
    same_top: float,
    *,
    floor: float | None = None,
    floor_same_top: float | None = None,
    non_finite: float = 0.0,
) -> str:
    """The verdict on a model that predicts tokens.

    It is the one that still holds for a divergence two standard errors above the measured one.

    Args:
        mean_kl: Mean KL divergence from the original, in nats a token.
        error: Its standard error; NaN where there is none.
        same_top: Share of tokens with the same most likely token.
        floor: The divergence that half precision alone causes.
        floor_same_top: The share of tokens that are the same in spite of half precision.
        non_finite: Share of tokens for which a model gave no finite logits.

    Examples:
        >>> verdict_on_tokens(0.0006, 0.00005, 0.991, floor=0.0012, floor_same_top=0.989)
        'indistinguishable from the original on this text: 99.1 % same next token, noise floor 98.9 %'
        >>> verdict_on_tokens(0.052, 0.002, 0.905)
        'close to the original on this text: 90.5 % same next token, told apart after some 58 tokens'
    """
    if non_finite or not math.isfinite(mean_kl):
        return f"{_BROKEN}: {format_percent(non_finite, 2)} of tokens got NaN or infinite logits"
    surely = mean_kl + (2 * error if math.isfinite(error) else 0.0)
    figure = f"{format_percent(same_top)} same next token"
    if surely <= (_FLOOR if floor is None else floor):
        beside = "" if floor_same_top is None else f", noise floor {format_percent(floor_same_top)}"
        return f"indistinguishable from the original on this text: {figure}{beside}"
    tokens = math.log(20) / mean_kl
    apart = f"told apart after some {format_count(_two_digits(tokens), 'token')}"
    return f"{_first(_LANGUAGE, surely)} on this text: {figure}, {apart}"


def verdict_on_loss(before: float, change: float, error: float) -> str:
    """The verdict by a loss that the caller gave, of which less is better.

    Args:
        before: The mean loss of the original.
        change: The mean of the differences.
        error: Its standard error; NaN where there is none.

    Examples:
        >>> verdict_on_loss(2.0, 0.01, 0.02)
        'no difference that these batches can tell: the loss changed by +0.01 ± 0.02'
        >>> verdict_on_loss(2.0, 0.1, 0.02)
        'worse: the loss rose by 5.0 %'
    """
    if not math.isfinite(change):
        return f"{_BROKEN}: the loss is not finite"
    if not abs(change) > 2 * error:  # of one batch, which has no error, too
        spread = f" ± {error:.2g}" if math.isfinite(error) else ", on one batch"
        return f"no difference that these batches can tell: the loss changed by {change:+.2g}{spread}"
    amount = format_percent(abs(change / before)) if before else f"{abs(change):.2g}"
    return f"{'worse: the loss rose' if change > 0 else 'better: the loss fell'} by {amount}"


def verdict_on_outputs(relative_error: float, non_finite: float = 0.0) -> str:
    """The verdict by outputs themselves.

    Args:
        relative_error: Root of the squared differences over that of the squared outputs.
        non_finite: Share of numbers that are NaN or infinite.

    Examples:
        >>> verdict_on_outputs(0.05)
        'close to the original on these inputs: outputs are off by 5.0 %'
    """
    if non_finite or not math.isfinite(relative_error):
        return f"{_BROKEN}: {format_percent(non_finite, 2)} of the outputs are NaN or infinite"
    return f"{_first(_OUTPUTS, relative_error)} on these inputs: outputs are off by {format_percent(relative_error)}"


def _first(levels: tuple[tuple[float, str], ...], value: float) -> str:
    return next((words for most, words in levels if value <= most), _BROKEN)


def _two_digits(value: float) -> int:
    return max(1, int(float(f"{value:.2g}")))
