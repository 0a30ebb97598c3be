"""Experts that a calibration reached, and those that it did not."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_tune.units import format_names

#: Inputs from which on a layer or an expert counts as reached, where the layer that got most has four times as many.
FEW_INPUTS = 32


def note_of_experts(counts: Sequence[int]) -> str | None:
    """Experts that calibration did not reach, or hardly, for a layer's remark; None where there are none.

    Examples:
        >>> note_of_experts([100, 0, 7, 80])
        'no calibration input reached expert 1 of 4; few reached expert 2 (7)'
    """
    without = [str(e) for e, count in enumerate(counts) if count == 0]
    few = [f"{e} ({count})" for e, count in enumerate(counts) if 0 < count < FEW_INPUTS]
    parts = []
    if without:
        parts.append(f"no calibration input reached {_named(without)} of {len(counts)}")
    if few:
        parts.append(f"few reached {_named(few)}" if without else f"few calibration inputs reached {_named(few)}")
    return "; ".join(parts) or None


def _named(experts: Sequence[str]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {format_names(experts)}"
