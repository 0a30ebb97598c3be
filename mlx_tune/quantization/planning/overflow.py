"""Packed layers whose numbers pass what their dtype can hold: found before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.lazy import number, read_array
from mlx_tune.quantization.formats.magnitudes import largest_magnitude
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.formats.scale_search import Effort
from mlx_tune.quantization.learning.apply import PackedArrays, pack
from mlx_tune.quantization.models.dense import dense_twin, dequantize_arrays
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.units import format_names

#: Weights below this share of the largest number cannot overflow: a group's span is twice its largest weight at most,
#: and no scale spans twice that.
_NEAR = 0.25


def overflows(arrays: PackedArrays, wanted: Format, dtype: mx.Dtype) -> bool:
    """True where unpacking meets numbers that the dtype does not hold.

    MLX unpacks affine weights in the dtype of their scales, code times scale first, and those of other modes in that of
    the inputs.

    Args:
        arrays: Packed weights, scales and biases.
        wanted: Their format.
        dtype: Of the inputs, which other modes are unpacked in.

    Examples:
        >>> weight = mx.array([[40000.0, -40000.0] * 32], dtype=mx.float16)
        >>> [overflows(mx.quantize(weight.astype(t), 64, 4), Format(4, 64), t) for t in (mx.float16, mx.bfloat16)]
        [True, False]
    """
    packed, scales, biases = arrays
    if biases is None:
        after = dequantize_arrays(packed, scales, None, **wanted.parts())
        return not number((mx.abs(after) <= mx.finfo(dtype).max).all())
    top, most = float(2**wanted.bits - 1), mx.finfo(scales.dtype).max
    scale, bias = scales.astype(mx.float32), biases.astype(mx.float32)
    fits = (mx.abs(scale * top) <= most) & (mx.abs(bias) <= most) & (mx.abs(bias + scale * top) <= most)
    return not number(fits.all())


def formats_that_fit(
    layer: LayerPlan, formats: list[Format], method: str, effort: Effort = "fast", largest: float | None = None
) -> list[Format]:
    """Those formats in which a layer does not overflow.

    Args:
        layer: A layer of a plan.
        formats: The formats that it could have.
        method: "nearest", or anything else for "optimal".
        effort: "fast" or "best".
        largest: The largest magnitude among its weights, where it is known.
    """
    least = min(mx.finfo(getattr(mx, wanted.scale_dtype or layer.dtype)).max for wanted in formats)
    if largest is not None and largest <= _NEAR * least:
        return formats
    weight = read_array(dense_twin(layer.module)["weight"])
    if largest_magnitude(weight) <= _NEAR * least:
        return formats
    how = "nearest" if method == "nearest" else "optimal"
    return [f for f in formats if not overflows(pack(weight, f, how, effort, layer.energy)[0], f, weight.dtype)]


def check_overflow(plan: QuantizationPlan, largest: Mapping[str, float]) -> None:
    """Refuse layers that would overflow as they are to be stored.

    Args:
        plan: The plan.
        largest: The magnitudes from `check_finite`.

    Raises:
        QuantizationError: There are some; the text names them.
    """
    broken = []
    for layer in plan.layers:
        assert layer.format is not None
        if not formats_that_fit(layer, [layer.format], plan.method, plan.effort, largest.get(layer.path)):
            broken.append(layer)
    if not broken:
        return
    first = broken[0]
    assert first.format is not None
    dtype = first.dtype if first.mode != "affine" else first.format.scale_dtype or first.dtype
    named = format_names([layer.path for layer in broken], most=3)
    wider = "store scales in bfloat16 with mode='affine' and scale_dtype='bfloat16', or " if dtype == "float16" else ""
    raise QuantizationError(
        f"{named} would overflow in {first.format}: {dtype} ends at {mx.finfo(getattr(mx, dtype)).max:,.6g}, and "
        f"unpacking passes that, so that the layer's outputs would be infinite. Nothing was changed: {wider}leave "
        f"the layer alone with skip={[layer.path for layer in broken[:3]]}."
    )


def note_of_range(plan: QuantizationPlan) -> tuple[str, ...]:
    """A plan's remark on layers in float16, whose weights it has not read."""
    short = [x for x in plan.layers if x.format is not None and (x.format.scale_dtype or x.dtype) == "float16"]
    if not short:
        return ()
    return (
        f"float16 ends at 65,504: should one of the {len(short)} layers that are unpacked in it hold weights that "
        "overflow there, quantize_model refuses by that layer's name.",
    )
