"""Functions with a gradient of their own, in a form that a trace can hold.

`mx.custom_function` makes a primitive that MLX cannot export, and its gradient is only called when the step is
differentiated. While a step is traced it is called at once instead, with placeholders for the cotangents. MLX's
differentiation goes through a sum that leads to the same places. Numbers that occur nowhere else mark both ends of
it, so that the cotangents and the gradients can be put where they belong afterwards.

Measured with MLX's derivative of the function instead, steps with a gradient of their own are estimated up to twice as
high, and mixtures of experts, whose sorted products rest on this, not at all: 29 of 65 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import mlx.core as mx

from mlx_tune.graphs.arguments import ArraySpec, argument_arrays, with_arrays
from mlx_tune.graphs.graph import Mark
from mlx_tune.graphs.tracing.recomputation import is_differentiable
from mlx_tune.units import number

#: Marks are the smallest numbers of float32, which no step computes with.
_SMALLEST = 2.0**-149

Result = TypeVar("Result")


@dataclass
class Marks:
    """The marks that a trace has set, by their numbers."""

    made: list[Mark] = field(default_factory=list)
    calls: int = 0

    def new(self, end: str, position: int, array: mx.array | ArraySpec, primitive: str = "") -> mx.array:
        """A number that occurs nowhere else, for one end of the latest call."""
        self.made.append(Mark(end, self.calls, position, tuple(array.shape), array.dtype, primitive))
        return mx.array(len(self.made) * _SMALLEST, mx.float32)

    def find(self, array: mx.array) -> Mark | None:
        """The mark that a captured array is."""
        if not self.made or array.size != 1 or array.dtype != mx.float32:
            return None
        mark = number(array) / _SMALLEST
        return self.made[int(mark) - 1] if 1 <= mark <= len(self.made) and mark.is_integer() else None


def called_with_gradient(
    function: Callable[..., Result],
    gradient: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    marks: Marks,
) -> Result:
    """Call a function so that a trace holds its own gradient too.

    Args:
        function: The function that computes the value.
        gradient: Its gradient, as `mx.custom_function.vjp` takes it.
        args: The function's arguments.
        kwargs: Its arguments by name; the gradient gets it as well.
        marks: Where to note the marks.

    Returns:
        The value that the function returns. It has its gradient after `fold_written_out`.
    """
    primals = argument_arrays((args, kwargs))
    made = function(*args, **kwargs)
    values = [mx.stop_gradient(y) for y in argument_arrays(made)]
    smooth = [i for i, x in enumerate(primals) if is_differentiable(x)]
    if not smooth or not any(map(is_differentiable, values)):
        return with_arrays(made, iter(values))
    marks.calls += 1
    # Where no cotangent arrives MLX passes zeros, which are as large as these.
    cotangents = (mx.full(y.shape, marks.new("cotangent", j, y).astype(y.dtype)) for j, y in enumerate(values))
    # The outputs are there when all of them are, and the inputs too: MLX passes them through one operation.
    outputs = iter(mx.depends(values, primals))
    before = args[0] if len(args) == 1 else args
    gradients = argument_arrays(gradient(before, with_arrays(made, cotangents), with_arrays(made, outputs), **kwargs))
    total = mx.array(0.0)
    # As a written-out checkpoint does, the sum waits for the values. Its derivative needs the numbers, and they wait
    # for the gradients: so those are in the graph exactly where they are asked for.
    smooth = [i for i in smooth if i < len(gradients)]
    for i, x in zip(smooth, mx.depends([primals[i] for i in smooth], values), strict=True):
        number = mx.depends([marks.new("input", i, x)], [mx.stop_gradient(gradients[i])])[0]
        total = total + x.astype(mx.float32).sum() * number
    for j, y in enumerate(values):
        if is_differentiable(y):
            z = mx.broadcast_to(total * marks.new("output", j, y), y.shape).astype(y.dtype)
            values[j] = y + (z - mx.stop_gradient(z))
    return with_arrays(made, iter(values))


def derivative_of(function: Callable[..., object]) -> Callable[..., object]:
    """The gradient that MLX gives a custom function that has none: the derivative of a second call.

    Args:
        function: The function that it differentiates.

    Returns:
        A gradient as `called_with_gradient` takes it.
    """

    def gradient(before: object, cotangents: object, outputs: object, **kwargs: object) -> list[mx.array]:
        args = before if isinstance(before, tuple) else (before,)

        def pure(*arrays: mx.array) -> list[mx.array]:
            inner_args, inner_kwargs = with_arrays((args, kwargs), iter(arrays))
            return argument_arrays(function(*inner_args, **inner_kwargs))

        return list(mx.vjp(pure, argument_arrays((args, kwargs)), argument_arrays(cotangents))[1])

    return gradient
