"""The layers that are up for choice where a size is to be met, and the formats that each could have."""

from __future__ import annotations

from mlx_tune.quantization.formats.modes import AFFINE_GROUP_SIZES, FIXED_MODES, ITEM_BYTES, Format
from mlx_tune.quantization.models.layers import why_not_quantizable
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan

#: Bits that a layer may get. One bit is left out: it costs more than leaving something else smaller would.
BITS = (2, 3, 4, 5, 6, 8)


def is_free(layer: LayerPlan, plan: QuantizationPlan) -> bool:
    """True where a layer is up for choice: also one that is left alone only because of its group size."""
    if layer.fixed:
        return False
    if layer.format is not None:
        return True
    whole = layer.dtype in ITEM_BYTES and layer.bytes_before >= layer.weights * ITEM_BYTES[layer.dtype]
    return whole and why_not_quantizable(layer.module, "affine") is None and bool(formats_for(layer, plan))


def formats_for(layer: LayerPlan, plan: QuantizationPlan) -> list[Format]:
    """Every format that the layer could have."""
    inner = layer.shape[-1]
    scales = None if plan.scale_dtype == layer.dtype else plan.scale_dtype
    sizes = [size for size in AFFINE_GROUP_SIZES if inner % size == 0]
    found = [Format(bits, size, scale_dtype=scales) for bits in BITS for size in sizes]
    if plan.method in ("nearest", "optimal"):
        for mode, (size, bits) in FIXED_MODES.items():
            if inner % size == 0 and why_not_quantizable(layer.module, mode) is None:
                found.append(Format(bits, size, mode))
    if layer.format is not None and layer.format not in found:
        found.append(layer.format)
    return found
