"""Rehearsal of a model with its layers packed, before anything is computed or changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.packing import PackedArrays
from mlx_tune.quantization.models.answers import Loss
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.layers import quantized_module
from mlx_tune.quantization.models.model_calls import outline, resolve
from mlx_tune.quantization.models.sites import in_places, module_at
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan


def rehearse(
    plan: QuantizationPlan, learn: list[Batch], judge: list[Batch], loss: Loss | None = None
) -> tuple[list[Batch], list[Batch]]:
    """Find out whether the model takes the batches, as it is and with its layers packed, before anything is done.

    Args:
        plan: A plan for the model.
        learn: Calibration, as `read_batches` gave it.
        judge: Evaluation.
        loss: The caller's loss.

    Returns:
        Both, as the model takes them.

    Raises:
        QuantizationError: It does not.
    """
    model = plan.layers[0].model
    learn, judge = resolve(model, learn, "calibration", loss), resolve(model, judge, "evaluation", loss)
    for batch in (learn or judge)[:1]:
        check_runs(model, plan.layers, batch, loss)
    return learn, judge


def check_runs(model: nn.Module, layers: Sequence[LayerPlan], batch: Batch, loss: Loss | None = None) -> None:
    """Call the model with its layers packed, nothing evaluated.

    A few models read a layer's weight themselves instead of calling the layer, as in `x @ embed_tokens.weight.T`.
    Packed weights cannot be read so, and it would show only when the quantized model is first used.

    Args:
        model: The model, which can be called with the batch; as it was when this returns or fails.
        layers: Layers of its plan.
        batch: The arguments of one call.
        loss: The caller's loss, to be called instead.

    Raises:
        QuantizationError: It cannot be called with these layers packed; the text names them.
    """
    expected = outline(model, batch, loss)

    def fault_with(chosen: Sequence[LayerPlan]) -> Exception | None:
        packed = {
            path: quantized_module(module_at(model, path), layer.wanted, _hollow(layer))
            for layer in chosen
            for path in layer.paths
        }
        with in_places(model, packed):
            found = outline(model, batch, loss)
        if isinstance(found, Exception):
            return found
        return None if found == expected else ValueError(f"outputs get shape {found} instead of {expected}")

    fault = fault_with(layers)
    if fault is None:
        return
    paths = [layer.path for layer in _guilty(layers, fault_with)]
    named = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more layers" if len(paths) > 3 else "")
    raise QuantizationError(
        f"The model cannot be called once {named or 'its layers'} {'is' if len(paths) == 1 else 'are'} packed: "
        f"{type(fault).__name__}: {str(fault).rstrip('.')}. Most likely its code reads the weight itself instead of "
        f"calling the layer, which packed weights do not allow. Leave it alone with skip={paths[:3] or '...'}."
    ) from fault


def _guilty(
    layers: Sequence[LayerPlan], fault_with: Callable[[Sequence[LayerPlan]], Exception | None]
) -> list[LayerPlan]:
    """The layers that cannot be packed, found by halving."""
    if fault_with(layers) is None:
        return []
    if len(layers) == 1:
        return list(layers)
    middle = len(layers) // 2
    return [layer for half in (layers[:middle], layers[middle:]) for layer in _guilty(half, fault_with)]


def _hollow(layer: LayerPlan) -> PackedArrays:
    """Packed arrays of a layer's shape that hold no memory unless they are evaluated."""
    *outer, inner = layer.shape
    groups = (*outer, inner // layer.wanted.group_size)
    packed = mx.zeros((*outer, inner * layer.wanted.bits // 32), dtype=mx.uint32)
    if layer.wanted.mode != "affine":
        return packed, mx.zeros(groups, dtype=mx.uint8), None
    dtype = getattr(mx, layer.wanted.scale_dtype or layer.dtype)
    return packed, mx.zeros(groups, dtype=dtype), mx.zeros(groups, dtype=dtype)
