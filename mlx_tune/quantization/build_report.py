"""The report of a plan that was carried out: what became of each layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_tune.measuring.float32_products import arithmetic
from mlx_tune.memory import track_memory
from mlx_tune.quantization.judging.accuracy import Accuracy
from mlx_tune.quantization.judging.report import LayerReport, QuantizationReport
from mlx_tune.quantization.judging.speed import SpeedComparison
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.units import format_count, format_names

#: Decibels below which a layer's error is more than half as large as its weights.
_LOST_DB = 6.0

#: Squared errors of outputs over their squares beyond which the model is likely broken. Outputs of zero have 1, or 2
#: where the rows of an embedding count as well.
_ASTRAY = 2.0


@dataclass(frozen=True)
class LayerOutcome:
    """The outcome of a layer.

    Attributes:
        path: Where it stands first.
        method: The method by which its codes were found: "nearest", "optimal", "gptq" or "dwq".
        snr_db: Power of the weights over the power of their error, in decibels; infinite where nothing was lost.
        output_error: Squared error of its outputs over their squares, measured on calibration; None if it was not.
        optimal_output_error: The same had it been quantized by "optimal".
        note: Further remarks, such as a fallback with its reason.
        input_snr_db: As `snr_db`, each input counted by its energy; None where that is not known.
        recovered: True where the weights lay on a grid that the format has, so that rounding of their dtype is all that
            was lost.
    """

    path: str
    method: str
    snr_db: float
    output_error: float | None = None
    optimal_output_error: float | None = None
    note: str | None = None
    input_snr_db: float | None = None
    recovered: bool = False


def report_of(
    plan: QuantizationPlan,
    outcomes: Mapping[str, LayerOutcome],
    memory: track_memory,
    accuracy: Accuracy | None,
    speed: SpeedComparison | None,
    notes: tuple[str, ...],
) -> QuantizationReport:
    """Join what was planned and measured to one report.

    Args:
        plan: The plan.
        outcomes: The outcome of each layer, by path.
        memory: Time and memory of carrying it out.
        accuracy: The cost on the evaluation.
        speed: Time of the model before and now.
        notes: Further remarks.
    """
    return QuantizationReport(
        method=plan.method,
        size_before_bytes=plan.size_before_bytes,
        size_after_bytes=plan.size_after_bytes,
        parameters=plan.parameters,
        layers=tuple(layer_report(layer, outcomes[layer.path]) for layer in plan.layers),
        skipped=tuple(layer_report(layer, None) for layer in plan.skipped),
        rest_bytes=plan.rest_bytes,
        accuracy=accuracy,
        speed=speed,
        seconds=memory.seconds,
        peak_bytes=memory.peak_bytes,
        arithmetic=arithmetic(),
        notes=(
            *plan.notes,
            *_recovered(outcomes),
            *_little_left(outcomes.values()),
            *_astray(outcomes.values()),
            *notes,
        ),
    )


def layer_report(layer: LayerPlan, outcome: LayerOutcome | None) -> LayerReport:
    """A planned layer and what became of it, if anything did."""
    recovered = "recovered" if outcome is not None and outcome.recovered else None
    reasons = [text for text in (layer.reason, recovered, outcome.note if outcome else None) if text]
    return LayerReport(
        path=layer.path,
        paths=layer.paths,
        kind=layer.kind,
        shape=layer.shape,
        bits=layer.bits,
        group_size=layer.group_size,
        mode=layer.mode,
        method=outcome.method if outcome else None,
        bytes_before=layer.bytes_before,
        bytes_after=layer.bytes_after,
        snr_db=outcome.snr_db if outcome else None,
        output_error=outcome.output_error if outcome else None,
        optimal_output_error=outcome.optimal_output_error if outcome else None,
        reason="; ".join(reasons) or None,
        cost_bytes=layer.cost_bytes,
    )


def _recovered(outcomes: Mapping[str, LayerOutcome]) -> tuple[str, ...]:
    """A sentence on layers that lost nothing."""
    count = sum(outcome.recovered for outcome in outcomes.values())
    if not count:
        return ()
    return (
        f"Recovered: the weights of {count} of {format_count(len(outcomes), 'layer')} lay on a grid already, and lose "
        "no more than the rounding of their dtype.",
    )


def _little_left(outcomes: Iterable[LayerOutcome]) -> tuple[str, ...]:
    """A warning where quantization left less than half of a layer's power, as where a mode's range ends before it.

    Weights that meet next to no input may well be lost.
    """
    lost = [x for x in outcomes if (x.snr_db if x.input_snr_db is None else x.input_snr_db) < _LOST_DB]
    if not lost:
        return ()
    named = format_names([f"{layer.path} ({layer.snr_db:.1f} dB)" for layer in lost], most=3)
    return (
        f"Warning: the error is more than half as large as the weights in {named}: give them more bits, or "
        "another mode.",
    )


def _astray(outcomes: Iterable[LayerOutcome]) -> tuple[str, ...]:
    """A warning where outputs on calibration are worse than none, which takes no evaluation to see."""
    lost = [x for x in outcomes if x.output_error is not None and x.output_error > _ASTRAY]
    if not lost:
        return ()
    named = format_names([f"{layer.path} ({layer.output_error:.3g})" for layer in lost], most=3)
    return (
        f"Warning: on calibration, the squared error of outputs is more than {_ASTRAY:.0f} times their squares in "
        f"{named}: the model is likely broken. Give its layers more bits, and judge it with "
        "evaluation=[batches].",
    )
