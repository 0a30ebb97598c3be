"""The time that a model takes, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_seconds


@dataclass(frozen=True)
class Speed:
    """Seconds of one model, the median of a few runs with its packed weights as it will be used.

    Attributes:
        prefill_tokens: Length of the prompt, 1 where none of more could be timed in reasonable time; None for models
            that are not called with tokens.
        prefill_seconds: Time for the whole prompt at once, or for one batch.
        decode_seconds: Time for a single token without context, which reads every weight once; None for models that
            are not called with tokens.
    """

    prefill_tokens: int | None
    prefill_seconds: float
    decode_seconds: float | None

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {
            "prefill_tokens": self.prefill_tokens,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
        }


@dataclass(frozen=True)
class SpeedComparison(Tabular):
    """Time before and after, measured here in one run.

    Attributes:
        before: The reference.
        after: The quantized model.
        device: The device that it ran on.
    """

    before: Speed
    after: Speed
    device: str

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), "device": self.device}

    def table(self) -> Table:
        """The table."""
        first, second = self.before, self.after
        tokens = first.prefill_tokens
        rows = []
        if tokens != 1:
            name = "one batch" if tokens is None else f"prefill, {tokens} tokens"
            rows.append(_row(name, first.prefill_seconds, second.prefill_seconds))
        if first.decode_seconds is not None and second.decode_seconds is not None:
            rows.append(_row("decode, one token without context", first.decode_seconds, second.decode_seconds))
        return Table(
            ("speed", "before", "after", "times as fast"),
            rows,
            title=f"Speed on this machine ({self.device}, measured)",
        )


def _row(name: str, before: float, after: float) -> tuple[str, str, str, str]:
    return name, format_seconds(before), format_seconds(after), f"{before / after:.2f}"
