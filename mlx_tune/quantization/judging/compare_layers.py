"""Two models of one architecture side by side, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.packed_arrays import signal_to_noise_db_between
from mlx_tune.quantization.judging.report import COMPARED, LayerReport, QuantizationReport
from mlx_tune.quantization.models.layers import (
    current_format,
    is_quantized,
    read_weight,
    weight_shape,
)
from mlx_tune.quantization.models.sites import WalkedModel, own_arrays
from mlx_tune.quantization.planning.layout import totals


def compare_layers(model: WalkedModel, reference: WalkedModel) -> QuantizationReport:
    """A report of sizes and of every quantized layer's error, without accuracy.

    Raises:
        QuantizationError: A layer's counterpart is missing or has another shape.
    """
    layers: list[LayerReport] = []
    skipped: list[LayerReport] = []
    counted: set[int] = set()
    seen_before: set[int] = set()
    others = {path: site.module for site in reference.sites for path in site.paths}
    for site in model.sites:
        module = site.module
        packed = is_quantized(module)
        dense = not packed and callable(getattr(module, "to_quantized", None))
        if not packed and not dense:
            continue
        before = _counterpart(others, site.path)
        shape = weight_shape(module)
        if weight_shape(before) != shape:
            raise QuantizationError(
                f"{site.path} has weights of shape {list(shape)} in one model and {list(weight_shape(before))} in the "
                "other: these are not two versions of one model."
            )
        now = current_format(module) if packed else None
        snr = None
        if packed:
            weight = read_weight(before)
            snr = signal_to_noise_db_between(weight, read_weight(module, mx.float32))
        (layers if packed else skipped).append(
            LayerReport(
                path=site.path,
                paths=site.paths,
                kind=type(before).__name__,
                shape=shape,
                bits=now.bits if now else None,
                group_size=now.group_size if now else None,
                mode=now.mode if now else None,
                method=None,
                bytes_before=_new_bytes(before, seen_before),
                bytes_after=_new_bytes(module, counted),
                snr_db=snr,
                reason=None if packed else "not quantized",
            )
        )
    size_before, parameters = totals(site.module for site in reference.sites)
    size_after, _ = totals(site.module for site in model.sites)
    return QuantizationReport(
        method=COMPARED,
        size_before_bytes=size_before,
        size_after_bytes=size_after,
        parameters=parameters,
        layers=tuple(layers),
        skipped=tuple(skipped),
        rest_bytes=size_after - sum(x.bytes_after for x in (*layers, *skipped)),
    )


def _counterpart(others: Mapping[str, nn.Module], path: str) -> nn.Module:
    found = others.get(path)
    if found is None:
        raise QuantizationError(f"The reference has no layer {path!r}: these are not two versions of one model.")
    if "weight" not in found:
        raise QuantizationError(f"{path!r} is a {type(found).__name__} without a weight in the reference.")
    return found


def _new_bytes(module: nn.Module, counted: set[int]) -> int:
    """Bytes of a module's arrays that were not counted with another."""
    arrays = [a for a in own_arrays(module).values() if id(a) not in counted]
    counted.update(id(a) for a in arrays)
    return sum(a.nbytes for a in arrays)
