"""Calling a model with batches, nothing evaluated, to learn whether and how it takes them."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.models.answers import Loss, mean_loss, output_arrays
from mlx_tune.quantization.models.arithmetic import exactly
from mlx_tune.quantization.models.batches import Batch, widen

#: What a call fails with where shapes, types or names do not belong together.
FAULTS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


def resolve(model: nn.Module, batches: list[Batch], where: str, loss: Loss | None = None) -> list[Batch]:
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


def outline(model: nn.Module, batch: Batch, loss: Loss | None = None) -> list[tuple[int, ...]] | Exception:
    """Call the model, or the loss with it, evaluating nothing.

    Args:
        model: The model.
        batch: The arguments of one call; of tokens, zeros in the shape of one sequence.
        loss: The caller's loss.

    Returns:
        The shapes of what it gives back, or what it fails with.
    """
    with exactly(model):
        try:
            if loss is not None:
                return [mean_loss(batch.call(loss, model, through=widen)).shape]
            given = batch if batch.tokens is None else Batch((mx.zeros_like(batch.tokens[:1, :-1]),), None)
            return [array.shape for array in output_arrays(given.call(model, through=widen))]
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
