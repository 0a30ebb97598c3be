"""Packed layers whose numbers pass what their dtype can hold: found before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlx_tune.errors import BackendError, QuantizationError
from mlx_tune.quantization.formats.modes import Effort, Format
from mlx_tune.quantization.formats.overflow import overflows
from mlx_tune.quantization.formats.packed_arrays import not_finite, pack_weight
from mlx_tune.quantization.formats.packing import dequantize_float32, quantize_nearest
from mlx_tune.quantization.formats.powers_of_two import largest_magnitude
from mlx_tune.quantization.models.layers import read_weight
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.units import format_names

#: Weights below this share of the largest number cannot overflow: a group's span is twice its largest weight at most,
#: and no scale spans twice that.
_NEAR = 0.25


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
    weight = read_weight(layer.module)
    if largest_magnitude(weight) <= _NEAR * least:
        return formats
    how = "nearest" if method == "nearest" else "optimal"
    return [f for f in formats if not overflows(pack_weight(weight, f, how, effort, layer.energy)[0], f, weight.dtype)]


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
        if not formats_that_fit(layer, [layer.wanted], plan.method, plan.effort, largest.get(layer.path)):
            broken.append(layer)
    if not broken:
        return
    first = broken[0]
    dtype = first.dtype if first.mode != "affine" else first.wanted.scale_dtype or first.dtype
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


def check_finite(plan: QuantizationPlan) -> dict[str, float]:
    """Look for NaN and infinite weights, layer by layer, before anything is changed.

    Returns:
        The largest magnitude among each layer's weights, by path.

    Raises:
        QuantizationError: There are some; the text names the layers.
    """
    broken, largest = [], {}
    for layer in plan.layers:
        weight = read_weight(layer.module)
        largest[layer.path] = largest_magnitude(weight)
        count = not_finite(weight)
        if count:
            broken.append(f"{layer.path} ({count} of {layer.weights:,} weights)")
    if broken:
        more = f", and {len(broken) - 3} layers more" if len(broken) > 3 else ""
        raise QuantizationError(
            f"NaN or infinite weights in {', '.join(broken[:3])}{more}. Quantizing them would spread them over whole "
            "groups. Look at the training run or the file they come from; nothing was changed."
        )
    return largest


def check_backend(plan: QuantizationPlan) -> None:
    """Run each packed format that the plan uses once, on a few numbers.

    Raises:
        BackendError: This backend has no kernel for one.
    """
    for wanted in {layer.format for layer in plan.layers if layer.format is not None}:
        weight = mx.ones((wanted.group_size, 2 * wanted.group_size), dtype=mx.bfloat16)
        inputs = mx.ones((2, 2 * wanted.group_size), dtype=mx.bfloat16)  # one row alone has a kernel of its own
        try:
            packed, scales, biases = quantize_nearest(weight, **wanted.keywords())
            if wanted.quantize_input:
                y = mx.qqmm(inputs, packed, scales, wanted.group_size, wanted.bits, wanted.mode)
            else:
                y = dequantize_float32(packed, scales, biases, **wanted.keywords())
            mx.eval(y)
        except (RuntimeError, ValueError) as error:
            what = "quantize a layer's inputs" if wanted.quantize_input else "compute with packed weights"
            advice = "Leave activations=True out" if wanted.quantize_input else "Use mode='affine'"
            raise BackendError(
                f"MLX cannot {what} in mode {wanted.mode!r} on this backend ({mx.default_device()}): "
                f"{str(error).rstrip('.')}. {advice}."
            ) from error
