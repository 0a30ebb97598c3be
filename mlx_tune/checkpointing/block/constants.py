"""Which arrays cannot have a gradient, because nothing that is differentiated leads to them.

MLX asks a function with a gradient of its own for the gradients of all of its inputs, and takes those it needs. Some
operations refuse some of them: `mx.fast.rope` its frequencies and `mx.fast.scaled_dot_product_attention` its mask on a
GPU, matrix decompositions everything. Such an input is a constant of the model, and the plain model never asks. MLX
does not tell Python which inputs are constants, but it writes graphs down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.reach.container_notes import Note, Ref
from mlx_tune.upstream import drawing, frozen, leaves_in, operations_in

T = TypeVar("T")


class Refusals:
    """The inputs of one block that an operation in it has no gradient for, remembered from call to call.

    Copies of a block find out for themselves.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[set[int], set[int]]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as an empty one: a copy remembers no constants."""
        return (Refusals, ())

    def without_constants(
        self,
        arrays: Sequence[mx.array],
        differentiable: set[int],
        notes: list[Note],
        gradients: Callable[[set[int]], T | Exception],
    ) -> tuple[T | Exception, set[int]]:
        """Take the gradients of all inputs; where an operation refuses one that is a constant, without that.

        Args:
            arrays: The inputs of this call.
            differentiable: The indices of those that could have gradients.
            notes: Where they were found.
            gradients: Takes the gradients of some of them, or gives the error.

        Returns:
            The result of `gradients`, and the indices that it was not asked for.
        """
        ignored: set[int] = set()
        if self._known and (known := self._known.get(_like(arrays))):
            suspects, refusing = known
            certain, tracers = constants(arrays, suspects)
            ignored = certain | tracers & refusing & untrained(notes)
        error = found = gradients(differentiable - ignored)
        if not isinstance(found, Exception):
            return found, ignored
        certain, tracers = constants(arrays, differentiable)
        found, refusing = gradients(differentiable - certain), set()
        if isinstance(found, Exception):
            # Which of the tracers refuse has to be tried: the others may be what is differentiated by.
            refusing = _refusing(sorted(tracers & untrained(notes)), gradients)
            found = gradients(differentiable - certain - refusing)
        if isinstance(found, Exception):
            return error, set()
        self._known[_like(arrays)] = certain | refusing, refusing
        return found, certain | refusing


def _like(arrays: Sequence[mx.array]) -> tuple[object, ...]:
    """The common key of calls with the same inputs in the same order."""
    return tuple((array.shape, array.dtype) for array in arrays)


def _refusing(indices: list[int], gradients: Callable[[set[int]], T | Exception]) -> set[int]:
    """Those of some inputs whose gradients are an error by themselves."""
    if not indices or not isinstance(gradients(set(indices)), Exception):
        return set()
    half = len(indices) // 2
    return _refusing(indices[:half], gradients) | _refusing(indices[half:], gradients) if half else set(indices)


def constants(arrays: Sequence[mx.array], among: Iterable[int]) -> tuple[set[int], set[int]]:
    """Find the arrays that are certainly constant, and those that may be.

    Everything in the arguments of a function that is differentiated is a tracer, what it is not differentiated by too:
    with a model among the arguments, as in mlx-lm's loss, that is every array of the model.

    Args:
        arrays: Arrays, evaluated or not. The graph of each that is looked at is walked.
        among: The indices of those to look at.

    Returns:
        The indices of those that no tracer leads to, or only past a `stop_gradient`, and of those that are tracers of
        such an array.

    Examples:
        >>> import mlx.core as mx
        >>> fixed = mx.ones((2,))
        >>> def loss(x):
        ...     print(*constants([x, fixed, fixed * 2, x * fixed], range(4)))
        ...     return x.sum()
        >>> gradient = mx.grad(loss)(fixed)
        {1, 2} {0}
    """
    names = {f"n{index}": index for index in among}
    drawn = drawing(**{name: arrays[index] for name, index in names.items()})
    certain, traced, tracers = set(leaves_in(drawn)), set[str](), set[str]()
    for operation, read, made in operations_in(drawn):
        if operation != "StopGradient" and not (traced.isdisjoint(read) and tracers.isdisjoint(read)):
            traced.update(made)
        elif _tracer() in ("", operation):
            tracers.update(made)
        else:
            certain.update(made)
    return {names[name] for name in certain & names.keys()}, {names[name] for name in tracers & names.keys()}


@cache
def _tracer() -> str:
    """The operation by which MLX marks what is differentiated; empty where that cannot be told."""
    drawn: list[str] = []

    def look(x: mx.array) -> mx.array:
        drawn.append(drawing(x))
        return x

    mx.grad(look)(mx.array(0.0))
    return next((operation for operation, _, _ in operations_in(drawn[0])), "")


def untrained(notes: list[Note]) -> set[int]:
    """The indices of arrays that modules hold and do not train: frozen ones, and those named with an underscore."""
    trained: set[int] = set()
    found: set[int] = set()
    for note in notes:
        if isinstance(note.place.held, nn.Module):
            untrained = frozen(note.place.held)
            for key, mark in note.marks.items():
                if type(mark) is Ref:
                    (found if key in untrained or str(key).startswith("_") else trained).add(mark.index)
    return found - trained
