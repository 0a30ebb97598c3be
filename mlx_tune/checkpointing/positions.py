"""Trying out that a module works on each position alone: a few positions, whole and in pieces, and one changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.block.randomness import draws_from
from mlx_tune.graphs.arguments import argument_arrays
from mlx_tune.state import Snapshot
from mlx_tune.upstream import set_mode

#: The positions of a trial.
LENGTH = 5
#: Where they are cut.
_CUT = 2
#: The share of the largest output by which results may differ: rounding, in half precision too.
_TOLERANCE = 0.03

Body = Callable[[list[mx.array]], object]


class UntriedError(Exception):
    """It cannot be tried out: the module takes something else than one array, or arrays have no values now."""


def mixing(module: nn.Module, body: Body, axes: int = 2, like: Sequence[mx.array] = ()) -> str | None:
    """Find out how a module's output at one position depends on others.

    The module runs a few times on five positions, in training and in evaluation mode, and is afterwards as before.

    Args:
        module: The module.
        body: The way to call it with arrays that have an axis of positions.
        axes: The number of axes up to that one.
        like: Arrays such as it is given, `[..., length, ...]`; by default one `[batch, length, width]`, whose width is
            found from the module's parameters.

    Returns:
        A sentence, or None where it does not show.

    Raises:
        UntriedError: It cannot be tried.
    """
    # A key of its own, since the stream's may have no value while a step is compiled.
    with draws_from(mx.random.key(0)), Snapshot([module, mx.random.state]):
        try:
            few = [_few(array, axes) for array in like] or [_input_for(module, body)]
            trial = _Trial(module, body, few, axes)
            return trial.writes() or trial.by_perturbing() or trial.by_cutting()
        except (ValueError, RuntimeError) as error:
            raise UntriedError(str(error).splitlines()[0]) from error


class _Trial:
    """Calls of one module on the same few positions, or some of them, or with one changed."""

    def __init__(self, module: nn.Module, body: Body, inputs: list[mx.array], axes: int) -> None:
        self._module, self._body, self._inputs, self._axes = module, body, inputs, axes

    def writes(self) -> str | None:
        before = {id(array) for array in argument_arrays(self._module.state)}
        _set_training(self._module, True)
        self._body(self._inputs)
        if all(id(array) in before for array in argument_arrays(self._module.state)):
            return None
        return "it writes arrays to its attributes, and each piece would write over the last"

    def by_perturbing(self) -> str | None:
        """One position changed, others looked at, with the same random draws."""
        _set_training(self._module, True)
        plain = self._run(self._inputs)
        for position in (0, LENGTH - 1):
            one = mx.arange(LENGTH) == position
            changed = [self._changed(array, one) for array in self._inputs]
            for before, after in zip(plain, self._run(changed), strict=True):
                moved = [i for i in _differing(before, after) if i != position]
                if moved:
                    return f"changing position {position} of its input changes position {moved[0]} of its output"
        return None

    def by_cutting(self) -> str | None:
        """All positions at once, and the first two and the others on their own."""
        _set_training(self._module, False)
        whole = self._run(self._inputs)
        if any(_differing(a, b) for a, b in zip(whole, self._run(self._inputs, seed=1), strict=True)):
            return None  # it draws in evaluation mode too
        pieces = zip(self._run(self._part(0, _CUT)), self._run(self._part(_CUT, LENGTH)), strict=True)
        for before, after in zip(whole, (mx.concatenate(list(parts)) for parts in pieces), strict=True):
            apart = _differing(before, after)
            if apart:
                return f"its output at position {apart[0]} is another where other positions are not there"
        return None

    def _part(self, start: int, stop: int) -> list[mx.array]:
        return [mx.take(array, mx.arange(start, stop), self._axes - 1) for array in self._inputs]

    def _changed(self, array: mx.array, where: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        return mx.where(where.reshape(-1, *(1 for _ in array.shape[self._axes :])), 4 * _normal(array, seed=1), array)

    def _run(self, inputs: list[mx.array], seed: int = 0) -> list[mx.array]:
        """The outputs as float32 `[length, everything else]`."""
        with draws_from(mx.random.key(seed)):
            outputs = argument_arrays(self._body(inputs))
        axes = inputs[0].shape[: self._axes]
        for output in outputs:
            if output.shape[: self._axes] != axes:
                raise UntriedError(f"given {list(inputs[0].shape)} it returned {list(output.shape)}")
        mx.eval(outputs)
        return [mx.moveaxis(y.astype(mx.float32), self._axes - 1, 0).reshape(axes[-1], -1) for y in outputs]


def _differing(a: mx.array, b: mx.array) -> list[int]:
    """The positions at which two outputs differ by more than rounding."""
    if a.shape != b.shape:
        return [0]
    scale = mx.maximum(mx.abs(a).max(), mx.abs(b).max())
    apart = (mx.abs(a - b) > _TOLERANCE * scale).any(axis=1)
    return [i for i in range(apart.size) if apart[i].item()]


def _input_for(module: nn.Module, body: Body) -> mx.array:
    """An input `[1, length, width]` of a width that the module takes."""
    _set_training(module, False)
    for width in dict.fromkeys(_widths(module)):
        x = _normal(mx.zeros((1, LENGTH, width)))
        try:
            outputs = argument_arrays(body([x]))
        except Exception:  # whatever a width that is not its own makes of it
            continue
        if outputs and all(output.shape[:2] == x.shape[:2] for output in outputs):
            return x
    raise UntriedError("it takes something else than one array [batch, length, width]")


def _few(array: mx.array, axes: int) -> mx.array:
    """A stand-in with one row and few positions; whole numbers, such as the choice of experts, are zero."""
    few = mx.zeros((*(1 for _ in range(axes - 1)), LENGTH, *array.shape[axes:]), array.dtype)
    return _normal(few) if mx.issubdtype(array.dtype, mx.floating) else few


def _normal(like: mx.array, seed: int = 0) -> mx.array:
    return mx.random.normal(like.shape, like.dtype, key=mx.random.key(seed))


def _widths(module: nn.Module) -> Iterator[int]:
    """Widths that inputs may have: those of the parameters, unpacked, with the inputs of layers first."""
    arrays = [(part, name, value) for part in module.modules() for name, value in part.items()]
    arrays = [(part, name, value) for part, name, value in arrays if isinstance(value, mx.array) and value.ndim]
    for part, name, value in arrays:
        if name == "scales" and hasattr(part, "group_size"):
            yield value.shape[-1] * part.group_size
        else:
            yield value.shape[-1]
    for _, _, value in arrays:
        yield value.shape[0]


def _set_training(module: nn.Module, training: bool) -> None:
    for part in module.modules():
        set_mode(part, training)
