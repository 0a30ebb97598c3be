"""Means with honest errors, and tails, of figures measured token by token; NumPy in float64, no device."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlx_tune.presentation.plain import Json

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

#: Edges of the buckets by the reference's confidence, its largest probability.
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class TokenFigures:
    """The measurements of each predicted token; arrays of one length, float64.

    Attributes:
        kl: KL divergence of the model from the reference, in nats.
        reverse_kl: That of the reference from the model.
        same_top: 1 where both find the same token most likely.
        nll_before: The reference's negative log-likelihood of the token that came.
        nll_after: The model's.
        confidence: The reference's largest probability.
        finite: 1 where both models' logits were numbers.
        sequence: The sequence that the token stands in.
    """

    kl: Floats
    reverse_kl: Floats
    same_top: Floats
    nll_before: Floats
    nll_after: Floats
    confidence: Floats
    finite: Floats
    sequence: Integers

    @property
    def usable(self) -> Any:
        """True, by token, where both models' answers are numbers and so is their distance."""
        import numpy as np

        return (self.finite > 0) & np.isfinite(self.kl) & np.isfinite(self.nll_after)


@dataclass(frozen=True)
class OutputFigures:
    """Sums over one batch of outputs, in float64.

    Attributes:
        product: Of both models' outputs.
        before: Of the reference's squares.
        after: Of the model's squares.
        difference: Of the squared differences.
        values: The number of values that were compared.
        non_finite: The number that were left out.
    """

    product: float
    before: float
    after: float
    difference: float
    values: int
    non_finite: int


@dataclass(frozen=True)
class Estimate:
    """A mean and how far it may be off.

    Attributes:
        mean: The mean.
        error: Its standard error, with tokens of one sequence taken together; `nan` with fewer than two sequences.
    """

    mean: float
    error: float

    def __str__(self) -> str:
        """The mean, with its error to two digits where there is one, both to the same decimal place.

        Examples:
            >>> print(Estimate(121.29, 1.512), Estimate(6.4e-6, 3.1e-8), Estimate(2.5, math.nan), sep=", ")
            121.3 ± 1.5, (6.400 ± 0.031)e-06, 2.5
        """
        if not math.isfinite(self.mean) or not math.isfinite(self.error) or self.error <= 0:
            return f"{self.mean:.5g}"
        places = 1 - math.floor(math.log10(self.error))
        if places <= 7 or abs(self.mean) >= 1e-3:
            return f"{self.mean:.{max(0, places)}f} ± {self.error:.{max(0, places)}f}"
        power = math.floor(math.log10(max(abs(self.mean), self.error)))
        digits = places + power
        return f"({self.mean / 10**power:.{digits}f} ± {self.error / 10**power:.{digits}f})e{power:03d}"

    def to_dict(self) -> dict[str, float | None]:
        """The same, ready for JSON."""
        return {"mean": finite_or_none(self.mean), "error": finite_or_none(self.error)}


def clustered_mean(values: Floats, clusters: Integers) -> Estimate:
    """The mean of all values, and its standard error where values of one cluster are alike.

    Tokens of one sequence are not independent: where a text is hard, all of its tokens are. Treating them as if they
    were makes errors several times too small. This is the sandwich estimate for cluster sampling (Cameron and
    Miller, A Practitioner's Guide to Cluster-Robust Inference, 2015), with the correction C / (C - 1).

    Args:
        values: One for each token.
        clusters: The sequence of each token.

    Returns:
        The mean and its error.

    Examples:
        >>> import numpy as np
        >>> clustered_mean(np.array([1.0, 1.0, 3.0, 3.0]), np.array([0, 0, 1, 1]))
        Estimate(mean=2.0, error=1.0)
    """
    import numpy as np

    if values.size == 0:
        return Estimate(math.nan, math.nan)
    mean = float(values.mean())
    _, places = np.unique(clusters, return_inverse=True)
    sums = np.bincount(places, weights=values - mean)
    count = len(sums)
    if count < 2:
        return Estimate(mean, math.nan)
    return Estimate(mean, float(np.sqrt(np.sum(sums**2) * count / (count - 1)) / values.size))


def exponential(log_mean: Estimate) -> Estimate:
    """The exponential of a mean of logarithms, such as a perplexity, its error to first order."""
    value = math.exp(log_mean.mean) if log_mean.mean < 700 else math.inf
    return Estimate(value, value * log_mean.error)


@dataclass(frozen=True)
class Bucket:
    """Tokens of which the reference was about equally sure.

    Attributes:
        low: The least confidence, the reference's largest probability.
        high: The highest, exclusive but for 1.
        tokens: The number of them.
        mean_kl: Their mean KL divergence, in nats; `nan` if there are none.
        same_top: The share of them with the same most likely token.
    """

    low: float
    high: float
    tokens: int
    mean_kl: float
    same_top: float

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {
            "low": self.low,
            "high": self.high,
            "tokens": self.tokens,
            "mean_kl": finite_or_none(self.mean_kl),
            "same_top": finite_or_none(self.same_top),
        }


def by_confidence(confidence: Floats, kl: Floats, same_top: Floats) -> tuple[Bucket, ...]:
    """Divergence and agreement, apart for tokens that the reference was unsure and sure of.

    Args:
        confidence: The reference's largest probability, for each token.
        kl: The KL divergence of each token.
        same_top: 1 where the most likely token is the same, else 0.
    """
    import numpy as np

    buckets = []
    for low, high in itertools.pairwise(CONFIDENCE_EDGES):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        count = int(np.count_nonzero(inside))
        mean = float(kl[inside].mean()) if count else math.nan
        agree = float(same_top[inside].mean()) if count else math.nan
        buckets.append(Bucket(low, high, count, mean, agree))
    return tuple(buckets)


def overlap(evaluation: list[object], calibration: list[Any], window: int = 32) -> float:
    """The share of the evaluation's windows of tokens that stand in the calibration too.

    Args:
        evaluation: Token arrays [batch, length], NumPy.
        calibration: The same.
        window: Tokens in a window; windows of the evaluation do not overlap each other, those of the calibration
            start at every token, so that a shifted copy is found as well.

    Returns:
        From 0 to 1; 0 where nothing is long enough to compare.

    Examples:
        >>> import numpy as np
        >>> a = np.arange(128).reshape(2, 64)
        >>> overlap([a], [a[:1]]), overlap([a], [a + 1000])
        (0.5, 0.0)
    """
    import numpy as np

    shortest = min((rows.shape[1] for rows in (*evaluation, *calibration)), default=0)
    window = min(window, shortest)
    if window < 4:
        return 0.0
    # Hashes of windows: a dot product with fixed random odd numbers, modulo 2^64.
    factors = np.random.default_rng(0).integers(1, 2**63, size=window, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

    def hashes(rows: Any, step: int) -> object:
        views = np.lib.stride_tricks.sliding_window_view(rows.astype(np.uint64), window, axis=1)[:, ::step]
        return (views * factors).sum(axis=-1, dtype=np.uint64).reshape(-1)

    seen = np.unique(np.concatenate([hashes(rows, 1) for rows in calibration]))
    asked = np.concatenate([hashes(rows, window) for rows in evaluation])
    return float(np.isin(asked, seen).mean())


def finite_or_none(value: object) -> Any:
    """A figure ready for JSON, which has neither NaN nor infinity; anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
