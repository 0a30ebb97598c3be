"""The plan before the act: a table of which layer gets what, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.quantization.formats.modes import ITEM_BYTES, Effort, Format
from mlx_tune.quantization.models.sites import Site
from mlx_tune.units import format_bytes, format_count


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer: a weight, however many modules and places share it.

    Attributes:
        path: Where it stands first.
        paths: Every place, tied modules included.
        kind: The module's class.
        shape: Of the weights as numbers, the output axis first: [outputs, inputs] or [experts, outputs, inputs].
        dtype: Of the unquantized weights.
        format: The format that it gets, or None where it is left as it is.
        bytes_before: Bytes of its arrays now, a shared weight counted with its first layer only.
        bytes_after: Bytes of its arrays afterwards.
        reason: Why it is left as it is, or differs from the rest.
        cost_bytes: The cost of leaving it: its bytes less those it would have in the format of the rest.
        fixed: True where an override, `skip` or the model itself decided, so that an allocation leaves it alone.
        order: Its place among all layers of the model, left alone or not.
        sites: Where its modules stand, one for each module that shares the weight.
        energy: The mean square of each of its inputs, `[inputs]`, once the model has been run; None where it was not.
        inputs: Reads rows of what it is given on calibration, `[rows, inputs]`; None where there is none.
    """

    path: str
    paths: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    format: Format | None
    bytes_before: int
    bytes_after: int
    reason: str | None = None
    cost_bytes: int = 0
    fixed: bool = False
    order: int = 0
    sites: tuple[Site, ...] = field(repr=False, compare=False, kw_only=True)
    energy: mx.array | None = field(default=None, repr=False, compare=False, kw_only=True)
    inputs: Callable[[], mx.array | None] | None = field(default=None, repr=False, compare=False, kw_only=True)

    @property
    def module(self) -> nn.Module:
        """The module that stands at `path` now: looked up, so that a plan keeps no replaced weights alive."""
        return self.sites[0].module

    @property
    def wanted(self) -> Format:
        """The format that it gets, of a layer that is not left as it is."""
        assert self.format is not None
        return self.format

    @property
    def bits(self) -> int | None:
        """Bits of a code, or None where the layer is left alone."""
        return None if self.format is None else self.format.bits

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale, or None where the layer is left alone."""
        return None if self.format is None else self.format.group_size

    @property
    def mode(self) -> str | None:
        """The packed format's mode, or None where the layer is left alone."""
        return None if self.format is None else self.format.mode

    @property
    def weights(self) -> int:
        """The number of its weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {
            "path": self.path,
            "paths": list(self.paths),
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "bits": self.bits,
            "group_size": self.group_size,
            "mode": self.mode,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "reason": self.reason,
            "cost_bytes": self.cost_bytes,
        }


@dataclass(frozen=True)
class QuantizationPlan(Tabular):
    """The table of what would happen. The model was not changed to make it.

    Attributes:
        layers: Those to be quantized, in the model's order.
        skipped: Those left as they are, each with its reason.
        rest_bytes: Bytes of everything that is no layer of either kind: norms, loose parameters.
        parameters: The number of unquantized parameters that the model stands for, tied ones once.
        method: The method by which scales and codes will be found.
        effort: "fast" or "best".
        size_before_bytes: Bytes of all parameters now, tied ones once.
        size_after_bytes: Bytes of all parameters afterwards.
        notes: Further remarks.
        scale_dtype: Of affine scales and biases; None for that of each layer's weights.
    """

    layers: tuple[LayerPlan, ...]
    skipped: tuple[LayerPlan, ...]
    rest_bytes: int
    parameters: int
    method: str
    effort: Effort
    size_before_bytes: int
    notes: tuple[str, ...] = ()
    scale_dtype: str | None = None

    @property
    def size_after_bytes(self) -> int:
        """Bytes of all parameters afterwards, tied ones once; predicted, and exact."""
        return self.rest_bytes + sum(layer.bytes_after for layer in (*self.layers, *self.skipped))

    @property
    def bits_per_weight(self) -> float:
        """All parameter bytes afterwards, times 8, for each unquantized parameter: as mlx-lm counts."""
        return 8 * self.size_after_bytes / self.parameters

    def with_formats(self, formats: Mapping[str, Format | None], reason: str | None = None) -> QuantizationPlan:
        """The same plan with other formats for some layers; None leaves a layer alone.

        Args:
            formats: Path of a layer to its format.
            reason: Why, for the table.
        """
        layers, skipped = [], []
        for layer in sorted((*self.layers, *self.skipped), key=lambda layer: layer.order):
            chosen = formats.get(layer.path, layer.format)
            if chosen is None:
                why = layer.reason if layer.format is None else reason
                skipped.append(replace(layer, format=None, bytes_after=layer.bytes_before, reason=why))
            elif chosen == layer.format:
                layers.append(layer)
            else:
                why = None if layer.format is None else layer.reason
                layers.append(
                    replace(layer, format=chosen, bytes_after=bytes_in(layer, chosen), reason=why, cost_bytes=0)
                )
        return replace(self, layers=tuple(layers), skipped=tuple(skipped))

    def with_remarks(self, remarks: Mapping[str, str]) -> QuantizationPlan:
        """The same plan with something else to know of some layers.

        Args:
            remarks: Path of a layer to the text.
        """

        def of(layers: tuple[LayerPlan, ...]) -> tuple[LayerPlan, ...]:
            return tuple(
                replace(x, reason="; ".join(t for t in (x.reason, remarks[x.path]) if t)) if x.path in remarks else x
                for x in layers
            )

        return replace(self, layers=of(self.layers), skipped=of(self.skipped))

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {
            "method": self.method,
            "effort": self.effort,
            "parameters": self.parameters,
            "size_before_bytes": self.size_before_bytes,
            "size_after_bytes": self.size_after_bytes,
            "bits_per_weight": self.bits_per_weight,
            "rest_bytes": self.rest_bytes,
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [layer.to_dict() for layer in self.skipped],
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """The table; its rows add up to its total."""
        rows = [
            (
                layer.path or "(the model)",
                "x".join(map(str, layer.shape)),
                str(layer.format) if layer.format else "left as it is",
                format_bytes(layer.bytes_before),
                format_bytes(layer.bytes_after),
                _remark(layer),
            )
            for layer in (*self.layers, *self.skipped)
        ]
        before_rest = self.size_before_bytes - sum(x.bytes_before for x in (*self.layers, *self.skipped))
        rows.append(("norms, biases and the rest", "", "left as it is", format_bytes(before_rest),
                     format_bytes(self.rest_bytes), ""))  # fmt: skip
        rows.append(("total", "", f"{self.bits_per_weight:.3f} bits per weight",
                     format_bytes(self.size_before_bytes), format_bytes(self.size_after_bytes), ""))  # fmt: skip
        return Table(
            ("layer", "shape", "becomes", "now", "after", "remark"),
            rows,
            title=f"Quantization plan ({self.method}, predicted; nothing changed)",
            notes=self.notes,
        )


def notes_of(layers: Sequence[LayerPlan], skipped: Sequence[LayerPlan]) -> tuple[str, ...]:
    """Notes on a plan's rows: how many layers are left as they are, why and at what cost, and the odd ones."""
    notes = []
    if skipped:
        reasons = Counter(layer.reason for layer in skipped)
        text = ", ".join(f"{count} ({reason})" for reason, count in reasons.most_common())
        cost = sum(layer.cost_bytes for layer in skipped)
        extra = f" They take {format_bytes(cost)} more than they would in the format of the rest." if cost else ""
        notes.append(f"Left as they are: {text}.{extra}")
    protected = sum(1 for layer in layers if layer.fixed)
    wide = [layer for layer in layers if layer.mode == "affine" and _scale_dtype(layer) == "float32"]
    if wide:
        saved = sum(
            bytes_in(x, x.format) - bytes_in(x, replace(x.format, scale_dtype="bfloat16")) for x in wide if x.format
        )
        notes.append(
            f"Scales and biases of {format_count(len(wide), 'layer')} are float32: in bfloat16, with "
            f"scale_dtype='bfloat16', they would take {format_bytes(saved)} less."
        )
    if protected:
        notes.append(f"{protected} of {format_count(len(layers), 'layer')} have a format of their own (see remarks).")
    return tuple(notes)


def _scale_dtype(layer: LayerPlan) -> str:
    return (layer.format.scale_dtype if layer.format else None) or layer.dtype


def bytes_in(layer: LayerPlan, wanted: Format) -> int:
    """Bytes of a planned layer's arrays in another format."""
    item = ITEM_BYTES[layer.dtype]
    packed = layer.weights * item if layer.format is None else layer.format.nbytes(layer.weights, item)
    return layer.bytes_after - packed + wanted.nbytes(layer.weights, item)


def _remark(layer: LayerPlan) -> str:
    parts = [layer.reason] if layer.reason else []
    if layer.format is None and layer.cost_bytes:
        parts.append(f"costs {format_bytes(layer.cost_bytes)}")
    if len(layer.paths) > 1:
        parts.append("shared with " + ", ".join(layer.paths[1:]))
    return "; ".join(parts)
