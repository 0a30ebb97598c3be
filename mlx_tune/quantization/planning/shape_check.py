"""Calls of a model, nothing evaluated: as it is, to learn how it takes batches, and with its layers packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.packing import PackedArrays
from mlx_tune.quantization.models.answers import Loss, mean_loss, output_arrays
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.layers import quantized_module
from mlx_tune.quantization.models.sites import WalkedModel, in_places, widen
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan

#: What a call fails with where shapes, types or names do not belong together.
FAULTS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


def rehearse(
    model: WalkedModel, plan: QuantizationPlan, learn: list[Batch], judge: list[Batch], loss: Loss | None = None
) -> tuple[list[Batch], list[Batch]]:
    """Find out whether the model takes the batches, as it is and with its layers packed, before anything is done.

    Args:
        model: The model.
        plan: A plan for it.
        learn: Calibration, as `read_batches` gave it.
        judge: Evaluation.
        loss: The caller's loss.

    Returns:
        Both, as the model takes them.

    Raises:
        QuantizationError: It does not.
    """
    learn, judge = resolve(model, learn, "calibration", loss), resolve(model, judge, "evaluation", loss)
    for batch in (learn or judge)[:1]:
        check_runs(model, plan.layers, batch, loss)
    return learn, judge


def resolve(model: WalkedModel, batches: list[Batch], where: str, loss: Loss | None = None) -> list[Batch]:
    """Call the model with the first batch, nothing evaluated, to learn whether and how it takes these batches.

    Args:
        model: The model.
        batches: The batches from `read_batches`.
        where: The argument that they came in, for errors.
        loss: The caller's loss, to be called instead.

    Returns:
        The batches; without tokens where the model takes the integer arrays as they are but not one token shorter.

    Raises:
        QuantizationError: The model, or the loss, cannot be called with them.
    """
    if not batches:
        return batches
    first = batches[0]
    fault = outline(model, first, loss)
    if not isinstance(fault, Exception):
        return batches
    plain = [replace(batch, tokens=None) for batch in batches]
    if loss is None and first.tokens is not None and not isinstance(outline(model, plain[0]), Exception):
        return plain
    raise uncallable(first, where, fault, "loss" if loss is not None else "model") from fault


def outline(model: WalkedModel, batch: Batch, loss: Loss | None = None) -> list[tuple[int, ...]] | Exception:
    """Call the model, or the loss with it, evaluating nothing.

    Args:
        model: The model.
        batch: The arguments of one call; of tokens, zeros in the shape of one sequence.
        loss: The caller's loss.

    Returns:
        The shapes of what it gives back, or what it fails with.
    """
    with model.exactly():
        try:
            if loss is not None:
                return [mean_loss(batch.call(loss, model.model, through=widen)).shape]
            given = batch if batch.tokens is None else Batch((mx.zeros_like(batch.tokens[:1, :-1]),), None)
            return [array.shape for array in output_arrays(given.call(model.model, through=widen))]
        except QuantizationError:
            raise
        except FAULTS as error:
            return error


def uncallable(batch: Batch, where: str, fault: Exception, what: str = "model") -> QuantizationError:
    named = [("", value) for value in batch.arguments] + [(f"{name}=", value) for name, value in batch.keywords.items()]
    shapes = ", ".join(f"{n}{list(v.shape) if isinstance(v, mx.array) else type(v).__name__}" for n, v in named)
    return QuantizationError(
        f"The {what} cannot be called with {where}[0] ({shapes}): {type(fault).__name__}: {str(fault).rstrip('.')}. "
        "Batches are what the model is called with: token arrays [batch, length], which are shifted here, tuples of "
        "arguments, or dictionaries of arguments by name."
    )


def check_runs(model: WalkedModel, layers: Sequence[LayerPlan], batch: Batch, loss: Loss | None = None) -> None:
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
        packed = [
            (site, quantized_module(site.module, layer.wanted, _hollow(layer)))
            for layer in chosen
            for site in layer.sites
        ]
        with in_places(packed):
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
