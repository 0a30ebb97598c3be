"""The drift of a model's answers: divergence, agreement and perplexity for token models, else losses or outputs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.quantization.judging.statistics import Bucket, Estimate, finite_or_none
from mlx_tune.quantization.judging.verdict import verdict_on_loss, verdict_on_outputs, verdict_on_tokens
from mlx_tune.units import format_count, format_percent


@dataclass(frozen=True)
class LanguageAccuracy(Tabular):
    """The cost of quantization to a model that predicts tokens. Divergences are in nats.

    Standard errors take the tokens of a sequence together, as they are not independent.

    Attributes:
        tokens: Predicted tokens that were compared.
        sequences: Sequences that they stand in.
        mean_kl: Mean KL divergence of the quantized model from the reference.
        mean_kl_error: Its standard error.
        median_kl: The middle one.
        p99_kl: Exceeded by one token in a hundred.
        p999_kl: Exceeded by one in a thousand.
        max_kl: The largest.
        reverse_kl: Mean KL divergence the other way round.
        reverse_kl_error: Its standard error.
        same_top: Share of tokens with the same most likely token.
        same_top_error: Its standard error.
        perplexity_before: Of the reference.
        perplexity_before_error: Its standard error.
        perplexity_after: Of the quantized model.
        perplexity_after_error: Its standard error.
        perplexity_ratio: After over before.
        perplexity_ratio_error: Its standard error, much smaller than those of both, which move together.
        probability_change: Root mean square change of the probability of the token that came.
        non_finite: Share of tokens for which a model gave NaN or infinity; they are left out of everything else.
        buckets: Divergence by the reference's confidence.
        noise_floor: Mean KL divergence of the reference in its own dtype from itself in float32: what rounding in
            half precision costs without any quantization. None where `no_noise_floor` says why.
        noise_floor_tokens: Tokens that it was measured on.
        noise_floor_same_top: Share of those with the same most likely token in both.
        no_noise_floor: Why there is no noise floor, such as weights in float32.
        arithmetic: The arithmetic of both.
        warnings: Reasons to doubt the figures.
    """

    tokens: int
    sequences: int
    mean_kl: float
    mean_kl_error: float
    median_kl: float
    p99_kl: float
    p999_kl: float
    max_kl: float
    reverse_kl: float
    reverse_kl_error: float
    same_top: float
    same_top_error: float
    perplexity_before: float
    perplexity_before_error: float
    perplexity_after: float
    perplexity_after_error: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    probability_change: float
    non_finite: float
    buckets: tuple[Bucket, ...]
    noise_floor: float | None = None
    noise_floor_tokens: int = 0
    noise_floor_same_top: float | None = None
    no_noise_floor: str | None = None
    arithmetic: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The cost in words, with the figure behind them."""
        return verdict_on_tokens(
            self.mean_kl,
            self.mean_kl_error,
            self.same_top,
            floor=self.noise_floor,
            floor_same_top=self.noise_floor_same_top,
            non_finite=self.non_finite,
        )

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON: figures that are no numbers become None."""
        figures = {k: finite_or_none(v) for k, v in asdict(self).items() if k not in ("buckets", "warnings")}
        return {
            "kind": "tokens",
            "verdict": self.verdict,
            **figures,
            "buckets": [b.to_dict() for b in self.buckets],
            "warnings": list(self.warnings),
        }

    def summary(self) -> str:
        """The figures that matter most, in a line."""
        return (
            f"mean KL {Estimate(self.mean_kl, self.mean_kl_error)} nats, same next token "
            f"{format_percent(self.same_top)}, perplexity {self.perplexity_before:.4g} -> {self.perplexity_after:.4g}, "
            f"on {format_count(self.tokens, 'token')}"
        )

    def tables(self) -> list[Table]:
        """Two tables: the figures, and divergence by confidence."""
        floor, notes = "none", _notes(self)
        if self.noise_floor is not None:
            floor = f"{self.noise_floor:.3g} (half precision alone, {self.noise_floor_tokens:,} tokens)"
        elif self.no_noise_floor:
            notes.append(f"No noise floor: {self.no_noise_floor}.")
        if math.isnan(self.mean_kl_error):
            notes.append("No standard errors: they are taken between sequences, and there is one.")
        rows = [
            ("mean KL, in nats", Estimate(self.mean_kl, self.mean_kl_error)),
            ("median, p99, p99.9, max KL", ", ".join(f"{x:.3g}" for x in self._tails())),
            ("mean reverse KL", Estimate(self.reverse_kl, self.reverse_kl_error)),
            ("noise floor of KL", floor),
            ("same top token", f"{Estimate(100 * self.same_top, 100 * self.same_top_error)} %"),
            ("perplexity before", Estimate(self.perplexity_before, self.perplexity_before_error)),
            ("perplexity after", Estimate(self.perplexity_after, self.perplexity_after_error)),
            ("perplexity ratio", Estimate(self.perplexity_ratio, self.perplexity_ratio_error)),
            ("change of probability, RMS", format_percent(self.probability_change, 2)),
        ]
        if self.non_finite:
            rows.append(("not finite, left out", format_percent(self.non_finite, 2)))
        title = f"Accuracy on {self.tokens:,} tokens of {format_count(self.sequences, 'sequence')} ({self.arithmetic})"
        figures = Table(("figure", "value"), rows, title=title, notes=notes)
        buckets = Table(
            ("reference's confidence", "tokens", "mean KL", "same top"),
            [
                (
                    f"{b.low:.2f} to {b.high:.2f}",
                    f"{b.tokens:,}",
                    f"{b.mean_kl:.4g}" if b.tokens else "",
                    format_percent(b.same_top) if b.tokens else "",
                )
                for b in self.buckets
            ],
        )
        return [figures, buckets]

    def _tails(self) -> tuple[float, float, float, float]:
        return self.median_kl, self.p99_kl, self.p999_kl, self.max_kl


@dataclass(frozen=True)
class LossAccuracy(Tabular):
    """The cost of quantization by a loss that the caller gave.

    Attributes:
        batches: The number that were compared.
        loss_before: Mean loss of the reference.
        loss_before_error: Its standard error over batches.
        loss_after: Mean loss of the quantized model.
        loss_after_error: Its standard error over batches.
        loss_change: Mean of the differences.
        loss_change_error: Its standard error over batches.
        non_finite: Share of batches for which a model's loss was NaN or infinite; they are left out.
        arithmetic: The arithmetic of both.
        warnings: Reasons to doubt the figures.
    """

    batches: int
    loss_before: float
    loss_before_error: float
    loss_after: float
    loss_after_error: float
    loss_change: float
    loss_change_error: float
    non_finite: float = 0.0
    arithmetic: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The cost in words, with the figure behind them."""
        return verdict_on_loss(self.loss_before, self.loss_change, self.loss_change_error)

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        figures = {k: finite_or_none(v) for k, v in asdict(self).items() if k != "warnings"}
        return {"kind": "loss", "verdict": self.verdict, **figures, "warnings": list(self.warnings)}

    def summary(self) -> str:
        """The figures that matter most, in a line."""
        return (
            f"loss {self.loss_before:.4g} -> {self.loss_after:.4g}, "
            f"change {Estimate(self.loss_change, self.loss_change_error)} "
            f"on {format_count(self.batches, 'batch', 'batches')}"
        )

    def table(self) -> Table:
        """The table."""
        return Table(
            ("figure", "value"),
            [
                ("loss before", Estimate(self.loss_before, self.loss_before_error)),
                ("loss after", Estimate(self.loss_after, self.loss_after_error)),
                ("change", Estimate(self.loss_change, self.loss_change_error)),
            ],
            title=f"Accuracy by the given loss on {format_count(self.batches, 'batch', 'batches')} ({self.arithmetic})",
            notes=_notes(self),
        )


@dataclass(frozen=True)
class OutputAccuracy(Tabular):
    """The cost of quantization by the model's outputs themselves.

    Attributes:
        batches: The number that were compared.
        values: The number of values.
        relative_error: Root of the squared differences over that of the squared reference outputs.
        worst_relative_error: The same for the worst batch.
        cosine: Mean over batches of the cosine between both outputs.
        worst_cosine: The smallest.
        non_finite: Share of numbers that are NaN or infinite in a model's outputs; they are left out.
        arithmetic: The arithmetic of both.
        warnings: Reasons to doubt the figures.
    """

    batches: int
    values: int
    relative_error: float
    worst_relative_error: float
    cosine: float
    worst_cosine: float
    non_finite: float
    arithmetic: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """The cost in words, with the figure behind them."""
        return verdict_on_outputs(self.relative_error, self.non_finite)

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        figures = {k: finite_or_none(v) for k, v in asdict(self).items() if k != "warnings"}
        return {"kind": "outputs", "verdict": self.verdict, **figures, "warnings": list(self.warnings)}

    def summary(self) -> str:
        """The figures that matter most, in a line."""
        return (
            f"relative error of outputs {self.relative_error:.4g}, cosine {self.cosine:.6f} "
            f"on {format_count(self.batches, 'batch', 'batches')}"
        )

    def table(self) -> Table:
        """The table."""
        rows = [
            ("relative error", f"{self.relative_error:.4g}"),
            ("relative error, worst batch", f"{self.worst_relative_error:.4g}"),
            ("cosine", f"{self.cosine:.6f}"),
            ("cosine, worst batch", f"{self.worst_cosine:.6f}"),
        ]
        if self.non_finite:
            rows.append(("not finite, left out", format_percent(self.non_finite, 2)))
        return Table(
            ("figure", "value"),
            rows,
            title=f"Accuracy of outputs on {format_count(self.batches, 'batch', 'batches')}, {self.values:,} numbers "
            f"({self.arithmetic})",
            notes=_notes(self),
        )


def _notes(accuracy: Accuracy) -> list[str]:
    verdict = accuracy.verdict
    return [f"{verdict[0].upper()}{verdict[1:]}.", *(f"Warning: {w}" for w in accuracy.warnings)]


Accuracy = LanguageAccuracy | LossAccuracy | OutputAccuracy


def divergence_of(accuracy: Accuracy) -> float:
    """The one number by which two quantizations of a model are compared; less is better."""
    if isinstance(accuracy, LanguageAccuracy):
        return accuracy.mean_kl
    if isinstance(accuracy, LossAccuracy):
        return accuracy.loss_after
    return accuracy.relative_error**2
