"""A model's answers: logits, outputs and losses, out of whatever its call gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_tune.errors import QuantizationError
from mlx_tune.units import dtype_name

#: `loss(model, *arguments)`: a scalar, or an array of which the mean counts.
Loss = Callable[..., object]

#: Dtypes that round more than float32.
HALVES = (mx.bfloat16, mx.float16)


def logits_of(output: object) -> Any:
    """The logits in what a model gave back: itself, its `.logits`, or the first of several."""
    if isinstance(output, mx.array):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = logits_of(output[0])
    if not isinstance(found, mx.array):
        return mx.zeros((0,))
    return found


def tree_of(output: object) -> object:
    """A model's output as MLX's functions for trees see into it: an object by its attributes."""
    return output if isinstance(output, (dict, list, tuple, mx.array)) else getattr(output, "__dict__", output)


def output_arrays(output: object) -> list[mx.array]:
    """Every floating point array in what a model gave back, as float32."""
    return [array.astype(mx.float32) for array in _floats(output)]


def narrow_dtype(output: object) -> str | None:
    """The name of the half-precision dtype of an array in what a model gave back; None where there is none."""
    return next((dtype_name(a.dtype) for a in _floats(output) if a.dtype in HALVES), None)


def _floats(output: object) -> list[mx.array]:
    flat: Any = tree_flatten(tree_of(output))
    return [leaf for _, leaf in flat if isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)]


def mean_loss(value: object) -> mx.array:
    """The number that a loss function gave back: an array, of which the mean counts, or a tuple that begins with it.

    Raises:
        QuantizationError: It is neither.
    """
    if isinstance(value, (tuple, list)) and value:
        value = value[0]  # as mlx-lm's own loss, which gives the number of tokens as well
    if isinstance(value, (int, float)):
        value = mx.array(float(value))
    if not isinstance(value, mx.array):
        raise QuantizationError(
            f"loss gave back a {type(value).__name__}: it must give back a number, or a tuple that begins with it."
        )
    return mx.mean(value)
