"""Functions with a gradient of their own, in a form that a trace can hold.

`mx.custom_function` makes a primitive that MLX cannot export, and its gradient is only called when the step is
differentiated. While a step is traced it is called at once instead, with placeholders for the cotangents. MLX's
differentiation goes through a sum that leads to the same places. Numbers that occur nowhere else mark both ends of
it, so that the cotangents and the gradients can be put where they belong afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import mlx.core as mx

from mlx_tune.graphs.arguments import arrays_of, with_arrays
from mlx_tune.graphs.graph import Graph, Node, Part
from mlx_tune.graphs.tracing.checkpoints import sums_with_nothing

#: Marks are the smallest numbers of float32, which no step computes with.
_SMALLEST = 2.0**-149


@dataclass(frozen=True)
class Mark:
    """One number: which end of which call it marks, and the shape and dtype of the array that belongs there."""

    end: str
    call: int
    position: int
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass
class Marks:
    """The marks that a trace has set, by their numbers."""

    made: list[Mark] = field(default_factory=list)
    calls: int = 0

    def new(self, end: str, position: int, array: mx.array) -> mx.array:
        """A number that occurs nowhere else, for one end of the latest call."""
        self.made.append(Mark(end, self.calls, position, tuple(array.shape), array.dtype))
        return mx.array(len(self.made) * _SMALLEST, mx.float32)

    def find(self, array: mx.array) -> Mark | None:
        """The mark that a captured array is."""
        if not self.made or array.size != 1 or array.dtype != mx.float32:
            return None
        number = float(array.item()) / _SMALLEST  # type: ignore[arg-type]  # MLX's stubs know of no float
        return self.made[int(number) - 1] if 1 <= number <= len(self.made) and number.is_integer() else None


def is_smooth(array: mx.array) -> bool:
    """True where gradients flow through arrays of this type."""
    return mx.issubdtype(array.dtype, mx.inexact)


def called_with_gradient(
    function: Callable[..., Any], gradient: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, marks: Marks
) -> Any:
    """Call a function so that a trace holds its own gradient too.

    Args:
        function: The function that computes the value.
        gradient: Its gradient, as `mx.custom_function.vjp` takes it.
        args: The function's arguments.
        kwargs: Its arguments by name; the gradient gets it as well.
        marks: Where to note the marks.

    Returns:
        The value that the function returns. It has its gradient after `fold_custom_gradients` and `fold_checkpoints`.
    """
    primals = arrays_of((args, kwargs))
    made = function(*args, **kwargs)
    values = [mx.stop_gradient(y) for y in arrays_of(made)]
    smooth = [i for i, x in enumerate(primals) if is_smooth(x)]
    if not smooth or not any(map(is_smooth, values)):
        return with_arrays(made, iter(values))
    marks.calls += 1
    # Where no cotangent arrives MLX passes zeros, which are as large as these.
    cotangents = (mx.full(y.shape, marks.new("cotangent", j, y).astype(y.dtype)) for j, y in enumerate(values))
    # The outputs are there when all of them are, and the inputs too: MLX passes them through one operation.
    outputs = iter(mx.depends(values, primals))
    before = args[0] if len(args) == 1 else args
    gradients = arrays_of(gradient(before, with_arrays(made, cotangents), with_arrays(made, outputs), **kwargs))
    total = mx.array(0.0)
    # As a written-out checkpoint does, the sum waits for the values. Its derivative needs the numbers, and they wait
    # for the gradients: so those are in the graph exactly where they are asked for.
    smooth = [i for i in smooth if i < len(gradients)]
    for i, x in zip(smooth, mx.depends([primals[i] for i in smooth], values), strict=True):
        number = mx.depends([marks.new("input", i, x)], [mx.stop_gradient(gradients[i])])[0]
        total = total + x.astype(mx.float32).sum() * number
    for j, y in enumerate(values):
        if is_smooth(y):
            z = mx.broadcast_to(total * marks.new("output", j, y), y.shape).astype(y.dtype)
            values[j] = y + (z - mx.stop_gradient(z))
    return with_arrays(made, iter(values))


def derivative_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient that MLX gives a custom function that has none: the derivative of a second call.

    Args:
        function: The function that it differentiates.

    Returns:
        A gradient as `called_with_gradient` takes it.
    """

    def gradient(before: Any, cotangents: Any, outputs: Any, **kwargs: Any) -> list[mx.array]:
        args = before if isinstance(before, tuple) else (before,)

        def pure(*arrays: mx.array) -> list[mx.array]:
            inner_args, inner_kwargs = with_arrays((args, kwargs), iter(arrays))
            return arrays_of(function(*inner_args, **inner_kwargs))

        return list(mx.vjp(pure, arrays_of((args, kwargs)), arrays_of(cotangents))[1])

    return gradient


def fold_custom_gradients(graph: Graph) -> None:
    """Put cotangents and gradients where the marks say. The sums between the marks are needed by nothing afterwards.

    Args:
        graph: The traced step, as it was built; changed in place.
    """
    if not graph.marks:
        return
    links = _Links(graph)
    placeholders = {(m.call, m.position): value for value, m in graph.marks.items() if m.end == "cotangent"}
    replaced: dict[int, int] = {}
    for value, mark in graph.marks.items():
        if mark.end == "input":
            replaced |= links.gradient(value, mark)
        elif mark.end == "output":
            replaced |= links.cotangent(value, mark, placeholders.get((mark.call, mark.position)))

    # Where the forward pass has the outputs too, they are those that the gradient gets.
    sums = sums_with_nothing(graph)
    for node in (node for node in graph.nodes if node.name == "Depends"):
        outputs = {out: value for out, value in zip(node.outputs, node.inputs, strict=False) if value in sums}
        replaced |= {out: graph.nodes[sums[value]].outputs[0] for out, value in outputs.items()}

    def new(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(latest, values))

    def latest(value: int) -> int:
        while value in replaced:  # the cotangent of one call can be the gradient of another
            value = replaced[value]
        return value

    graph.nodes = [Node(n.name, new(n.inputs), n.outputs, n.arguments) for n in graph.nodes]
    graph.outputs = list(new(tuple(graph.outputs)))
    graph.parts = [Part(new(part.inputs), new(part.outputs)) for part in graph.parts]


class _Links:
    """Who makes and who reads each value of a graph, and the ways from the marks to the arrays that belong there."""

    def __init__(self, graph: Graph) -> None:
        self.values = graph.values
        self.made_by = {value: node for node in graph.nodes for value in node.outputs}
        self.readers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self.readers.setdefault(value, []).append(node)

    def gradient(self, number: int, mark: Mark) -> dict[int, int]:
        """The array that differentiation made for an input, and its gradient; empty where not asked for."""
        depends = self.readers[number][0]
        product = self._backward(depends.outputs[0])
        if product is None:
            return {}
        made = self._down(product.outputs[0], mark, "ExpandDims Reshape Unflatten Broadcast BroadcastAxes AsType")
        if made is None:
            return {}
        stopped = self.made_by.get(depends.inputs[1])
        # Where the exporter has dropped it, the gradient itself is there.
        return {made: stopped.inputs[0] if stopped and stopped.name == "StopGradient" else depends.inputs[1]}

    def cotangent(self, number: int, mark: Mark, placeholder: int | None) -> dict[int, int]:
        """The placeholder for an output's cotangent, and the cotangent; nothing where none arrives."""
        backward = self._backward(number)
        if backward is None or placeholder is None:
            return {}
        full = self.readers[placeholder][0]
        while full.name != "Full":
            full = self.readers[full.outputs[0]][0]
        value, summed = backward.inputs[1], prod(mark.shape) == 1
        while not (summed and self._fits(value, mark)):
            if value not in self.made_by:
                return {}
            summed = summed or self.made_by[value].name == "Reduce"
            value = self.made_by[value].inputs[0]
        return {full.outputs[0]: value}

    def _backward(self, number: int) -> Node | None:
        """The derivative of a product with a number: MLX writes the number first there. None where there is not one."""
        products = [n for n in self.readers.get(number, []) if n.name == "Multiply" and n.inputs[0] == number]
        return products[0] if len(products) == 1 else None

    def _down(self, value: int, mark: Mark, through: str) -> int | None:
        """The first value of the right shape and type behind some operations; None where nothing reads it."""
        while not self._fits(value, mark):
            readers = [node for node in self.readers.get(value, []) if node.name in through.split()]
            if not readers:
                return None
            value = readers[0].outputs[0]
        return value

    def _fits(self, value: int, mark: Mark) -> bool:
        return self.values[value].shape == mark.shape and self.values[value].dtype == mark.dtype
