"""The report of a quantized model, layer by layer, with what it cost."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.quantization.judging.accuracy import Accuracy
from mlx_tune.quantization.judging.report_picture import DrawnLayer
from mlx_tune.quantization.judging.speed import SpeedComparison
from mlx_tune.units import format_bytes, format_count, format_percent, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Stands for a method where two models were compared, however the one came from the other.
COMPARED = "compared"


@dataclass(frozen=True)
class LayerReport:
    """One layer, quantized or left as it is.

    Attributes:
        path: Where it stands first.
        paths: Every place, tied modules included.
        kind: The module's class before.
        shape: Of the weights as numbers.
        bits: Bits of a code, or None where it is left as it is.
        group_size: Weights that share a scale, or None.
        mode: "affine", "mxfp4", "mxfp8", "nvfp4", or None.
        method: The method by which the codes were found, or None.
        bytes_before: Bytes of its arrays before.
        bytes_after: Bytes of its arrays now.
        snr_db: Power of the weights over that of their error, in decibels; infinite where nothing was lost, None
            where it is left as it is or was not measured.
        reason: Why it is left as it is, or what else there is to know.
        cost_bytes: The cost of leaving it, against the format of the rest.
        output_error: Squared error of its outputs over their squares, measured on calibration; None where it was not.
        optimal_output_error: The same had it been quantized by "optimal".
    """

    path: str
    paths: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    bits: int | None
    group_size: int | None
    mode: str | None
    method: str | None
    bytes_before: int
    bytes_after: int
    snr_db: float | None
    reason: str | None = None
    cost_bytes: int = 0
    output_error: float | None = None
    optimal_output_error: float | None = None

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        finite = self.snr_db is not None and math.isfinite(self.snr_db)
        return {
            **{k: getattr(self, k) for k in ("path", "kind", "bits", "group_size", "mode", "method")},
            "paths": list(self.paths),
            "shape": list(self.shape),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "snr_db": self.snr_db if finite else None,
            "lossless": self.snr_db == math.inf,
            "reason": self.reason,
            "cost_bytes": self.cost_bytes,
            "output_error": self.output_error,
            "optimal_output_error": self.optimal_output_error,
        }

    def drawn(self) -> DrawnLayer:
        """The same for a picture: its name without the block that it stands in, and the error in percent."""
        kind = next((part for part in reversed(self.path.split(".")) if part and not part.isdecimal()), self.kind)
        known = self.snr_db is not None and self.snr_db > -math.inf
        # Of a lossless layer, whose decibels are infinite, zero.
        error = 100 * 10 ** (-self.snr_db / 20) if known and self.snr_db is not None else None
        return DrawnLayer(kind, error, self.bytes_before, self.bytes_after)


@dataclass(frozen=True)
class QuantizationReport(Tabular):
    """The measured report of `quantize_model`; `print` it.

    Attributes:
        method: The method that was asked for; "compared" where two models were compared.
        size_before_bytes: Bytes of all parameters before, tied ones once.
        size_after_bytes: Bytes of all parameters now.
        parameters: The number of unquantized parameters that the model stands for.
        layers: The quantized ones, in the model's order.
        skipped: Those left as they are, each with its reason.
        rest_bytes: Bytes of everything else: norms, loose parameters.
        accuracy: The cost on the evaluation batches, or None where none were given.
        speed: Time of the model before and now, or None where none was measured.
        seconds: The time of quantizing, evaluation left out.
        peak_bytes: The most that MLX held meanwhile, evaluation left out; None where nothing was quantized.
        arithmetic: The arithmetic of the float32 products that it was judged by, in a sentence.
        notes: Further remarks.
        warning: A sentence where the model is worse than rounding to nearest would have made it, measured on a part of
            the evaluation; None where it is not, or nothing was measured.
    """

    method: str
    size_before_bytes: int
    size_after_bytes: int
    parameters: int
    layers: tuple[LayerReport, ...]
    skipped: tuple[LayerReport, ...]
    rest_bytes: int
    accuracy: Accuracy | None = None
    speed: SpeedComparison | None = None
    seconds: float = 0.0
    peak_bytes: int | None = None
    arithmetic: str = ""
    notes: tuple[str, ...] = ()
    warning: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """All parameter bytes times 8, for each unquantized parameter: as mlx-lm counts.

        mlx-lm leaves parameters of modules that hold other modules out of its count of parameters, but not out of
        its count of bytes; of models that have such, its figure is somewhat higher.
        """
        return 8 * self.size_after_bytes / self.parameters

    @property
    def bits_per_weight_before(self) -> float:
        """The same before quantization."""
        return 8 * self.size_before_bytes / self.parameters

    @property
    def verdict(self) -> str | None:
        """The cost on the evaluation in words, with the figure behind them; None where nothing was evaluated."""
        return None if self.accuracy is None else self.accuracy.verdict

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {
            "method": self.method,
            "size_before_bytes": self.size_before_bytes,
            "size_after_bytes": self.size_after_bytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "bits_per_weight_before": self.bits_per_weight_before,
            "rest_bytes": self.rest_bytes,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [layer.to_dict() for layer in self.skipped],
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "speed": None if self.speed is None else self.speed.to_dict(),
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "arithmetic": self.arithmetic,
            "notes": list(self.notes),
            "warning": self.warning,
            "verdict": self.verdict,
        }

    def summary(self) -> str:
        """A few lines: size, bits, and what it cost."""
        share = self.size_after_bytes / self.size_before_bytes
        lines = [
            f"{format_bytes(self.size_before_bytes)} -> {format_bytes(self.size_after_bytes)} "
            f"({format_percent(share)}), {self._bits()}, {format_count(len(self.layers), 'layer')} "
            f"{'quantized' if self.method == COMPARED else f'by {self.method}'}, {len(self.skipped)} left as they are"
        ]
        if self.warning is not None:
            lines.insert(0, f"{self.warning}.")
        if self.accuracy is not None:
            lines += [self.accuracy.verdict, self.accuracy.summary()]
        return "\n".join(lines)

    def _bits(self) -> str:
        return f"bits per weight {self.bits_per_weight_before:.3f} -> {self.bits_per_weight:.3f}"

    def tables(self) -> list[Table]:
        """The whole report; the layers' rows add up to the total."""
        found = [self._layer_table()]
        for part in (self.accuracy, self.speed):
            found += [] if part is None else part.tables()
        return found

    def plot(self, path: str | os.PathLike[str] | None = None, *, dark: bool = False) -> Figure:
        """Draw every layer's error against its depth, and its bytes.

        Args:
            path: Where to save it, as SVG or PNG by its ending; None for not at all.
            dark: For dark pages.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from mlx_tune.quantization.judging.report_picture import draw_layers

        sizes = f"{format_bytes(self.size_before_bytes)} to {format_bytes(self.size_after_bytes)}"
        title = f"{sizes}, {self.bits_per_weight:.2f} bits per weight, {self.method}"
        drawn, left = ([layer.drawn() for layer in part] for part in (self.layers, self.skipped))
        return draw_layers(title, drawn, left, path, dark=dark)

    def _layer_table(self) -> Table:
        rows: list[tuple[object, ...]] = [
            (
                layer.path or "(the model)",
                "x".join(map(str, layer.shape)),
                layer.bits,
                layer.group_size
                if layer.mode == "affine" or layer.mode is None
                else f"{layer.group_size} {layer.mode}",
                format_bytes(layer.bytes_before),
                format_bytes(layer.bytes_after),
                _decibels(layer.snr_db),
                _remark(layer, self.method),
            )
            for layer in (*self.layers, *self.skipped)
        ]
        before = self.size_before_bytes - sum(x.bytes_before for x in (*self.layers, *self.skipped))
        rows.append(("norms, biases and the rest", "", None, None, format_bytes(before),
                     format_bytes(self.rest_bytes), None, ""))  # fmt: skip
        rows.append(("total", "", None, None, format_bytes(self.size_before_bytes),
                     format_bytes(self.size_after_bytes), None, self._bits()))  # fmt: skip
        notes = list(self.notes)
        if self.seconds:
            peak = f", at most {format_bytes(self.peak_bytes)} in use" if self.peak_bytes else ""
            notes.append(f"Quantized in {format_seconds(self.seconds)}{peak}. {self.arithmetic}".rstrip())
        title = f"Quantization report ({self.method}, measured)"
        return Table(
            ("layer", "shape", "bits", "group", "before", "after", "SNR dB", "remark"),
            rows,
            title=f"{self.warning}. {title}" if self.warning else title,
            notes=notes,
        )


def _decibels(value: float | None) -> str | None:
    if value is None:
        return None
    return "lossless" if value == math.inf else f"{value:.2f}"


def _remark(layer: LayerReport, method: str) -> str:
    parts = [layer.reason] if layer.reason else []
    if layer.output_error is not None and layer.optimal_output_error:
        parts.append(f"output error {layer.output_error / layer.optimal_output_error:.2f} of optimal's")
    if layer.method is not None and layer.method != method:
        parts.append(f"by {layer.method}")
    if layer.cost_bytes:
        parts.append(f"costs {format_bytes(layer.cost_bytes)}")
    if len(layer.paths) > 1:
        parts.append("shared with " + ", ".join(layer.paths[1:]))
    return "; ".join(parts)
