"""Checkpointed functions in a form that a trace can hold.

`mx.checkpoint` is a primitive that MLX cannot export, so while a step is traced a checkpointed function
is written out instead: its value, and next to it a second evaluation that only the gradient reaches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import mlx.core as mx

#: Makes a number that occurs nowhere else for a kind of place, its position and the array that belongs there.
Mark = Callable[[str, int, mx.array], mx.array]

_thread = threading.local()


def is_tracing() -> bool:
    """Tell whether a step is being traced on this thread, by `estimate_memory` or a search that starts from a graph.

    Use it to leave out what cannot be traced, such as communication between machines.

    Returns:
        True inside a step that is being traced, false anywhere else, other threads included.

    Examples:
        >>> import mlx_tune as mt
        >>> mt.is_tracing()
        False
    """
    return getattr(_thread, "depth", 0) > 0


def is_differentiable(array: mx.array) -> bool:
    """True where gradients flow through arrays of this type."""
    return mx.issubdtype(array.dtype, mx.inexact)


@contextmanager
def tracing(mark: Mark | None = None) -> Iterator[None]:
    """Make `is_tracing` true on this thread for the body; nests.

    Args:
        mark: Marks where the cotangents arrive that a checkpoint waits for; None where none waits.
    """
    outer = getattr(_thread, "mark", None)
    _thread.depth, _thread.mark = getattr(_thread, "depth", 0) + 1, mark
    try:
        yield
    finally:
        _thread.depth, _thread.mark = _thread.depth - 1, outer


def traced_checkpoint(
    pure: Callable[..., Sequence[mx.array]], arrays: Sequence[mx.array], *, waits: bool = False
) -> list[mx.array]:
    """Call a checkpointed function so that its recomputation appears in an exported graph.

    The value is y = pure(arrays), cut off from the gradient. The gradient goes through a second evaluation z
    of `pure` whose inputs depend on y, as MLX's own recomputation does. Returned is y + (z - stop_gradient(z)),
    which has the value of y and the gradient of z. The simulation knows the pattern by the dependency on y and
    takes the sum for y itself, so z is only computed where the backward pass needs it.

    Args:
        pure: a function of arrays only, without side effects, returning arrays.
        arrays: what to call it with.
        waits: true where the second evaluation begins when the gradients of the outputs are there, as that of
            `mlx_tune.checkpoint` does. A factor of z - stop_gradient(z) then marks where they arrive.

    Returns:
        The arrays that `pure` returns, in order. Integers and booleans carry no gradient and are passed on.

    Examples:
        >>> import mlx.core as mx
        >>> from mlx_tune.graphs import traced_checkpoint
        >>> square = lambda x: mx.sum(traced_checkpoint(lambda x: [x * x], [x])[0])
        >>> mx.grad(square)(mx.array([1.0, 2.0])).tolist()
        [2.0, 4.0]
    """
    arrays = list(arrays)
    values = [mx.stop_gradient(y) for y in pure(*arrays)]
    if not any(is_differentiable(y) for y in values):
        return values
    again = pure(*mx.depends(arrays, values))
    mark: Mark | None = getattr(_thread, "mark", None) if waits else None

    def zero(z: mx.array, position: int) -> mx.array:
        difference = z - mx.stop_gradient(z)
        return difference if mark is None else mark("checkpoint", position, z).astype(z.dtype) * difference

    return [y + zero(z, i) if is_differentiable(y) else y for i, (y, z) in enumerate(zip(values, again, strict=True))]


def weights_first(arrays: Sequence[mx.array], arguments: AbstractSet[int], among: AbstractSet[int]) -> list[mx.array]:
    """The inputs of a call in a form in which a trace shows that gradients of some of them wait for others.

    Args:
        arrays: The inputs.
        arguments: The indices of those whose gradients wait.
        among: Those, and the indices of the inputs whose gradients they wait for, where they are asked for.

    Returns:
        The inputs times marks, behind an operation of their own.
    """
    mark: Mark | None = getattr(_thread, "mark", None)
    if mark is None or not arguments:
        return list(arrays)
    held: list[mx.array] = mx.depends(list(arrays), [])
    for i in among:
        held[i] = mark("argument" if i in arguments else "weight", i, held[i]).astype(held[i].dtype) * held[i]
    return held
