"""Running a module that works on each position alone piece by piece, forward and for its gradient.

A piece begins when the one before is done: the inputs of each depend on the results of the last. Without that MLX runs
all pieces' forward passes before it needs the first, and holds what all of them computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.block.constants import Refusals, untrained
from mlx_tune.checkpointing.block.keep import Frame
from mlx_tune.checkpointing.block.randomness import draws_from, thread_stream
from mlx_tune.checkpointing.block.recompute import Call, is_plain, is_recomputing, recomputed
from mlx_tune.checkpointing.block.weights_first import tied
from mlx_tune.errors import CheckpointError
from mlx_tune.graphs.arguments import argument_arrays, with_arrays


def call_tiled(
    body: Callable[..., object],
    owner: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    tokens: int,
    refusals: Refusals,
) -> object:
    """Call `body(*args, **kwargs)` on a few positions at a time, and so again for its gradient.

    The first array among the arguments, `[..., length, width]`, is cut along its length, and with it every other that
    begins with the same axes, `[..., length]`.

    Args:
        body: The module's own way of being called.
        owner: The module.
        args: Positional arguments.
        kwargs: Named arguments.
        tokens: The most positions in a piece, all leading axes together.
        refusals: The findings of earlier calls.

    Returns:
        The value that the body returns on everything at once.

    Raises:
        CheckpointError: The module returned an array without those axes, or writes arrays to where they stay.
    """
    given = argument_arrays((args, kwargs))
    if is_plain() or not given or given[0].ndim < 2:
        return body(*args, **kwargs)
    axes = given[0].shape[:-1]
    if not owner.training and prod(axes) <= tokens:
        return body(*args, **kwargs)
    call = _Pieces(body, owner, args, kwargs, refusals, axes, tokens)
    return call.result(recomputed(call))


class _Pieces(Call):
    """One call of a module, cut into pieces.

    Args:
        body: As for `Call`.
        owner: As for `Call`.
        args: As for `Call`.
        kwargs: As for `Call`.
        refusals: As for `Call`.
        axes: The axes that arrays to be cut begin with, the length last.
        tokens: The most positions in a piece.
    """

    def __init__(
        self,
        body: Callable[..., object],
        owner: object,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        refusals: Refusals,
        axes: tuple[int, ...],
        tokens: int,
    ) -> None:
        super().__init__(body, owner, args, kwargs, frozenset(), refusals)
        self._axes = axes
        size = max(1, tokens // max(1, prod(axes[:-1])))
        self._places = [(start, min(start + size, axes[-1])) for start in range(0, axes[-1], size)]
        cut = {id(array) for array in argument_arrays((args, kwargs)) if self._is_cut(array)}
        self._cut = {i for i, array in enumerate(self.arrays) if id(array) in cut}
        # The run for the gradient of an enclosing checkpoint does not need what this gives, and does not compute it.
        self._waits = not is_recomputing()

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """All pieces' results, joined."""
        found = super().__call__(*arrays)
        if self.outputs is not None and self.outputs.written:
            raise CheckpointError(
                f"{self.name} cannot be tiled: it writes arrays to its attributes or to what it was given, and each "
                "piece would write over the last. Tile the modules inside it that only return what they compute."
            )
        return found

    def first(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """The value of all pieces, in order."""
        given = argument_arrays((args, kwargs))
        stream = thread_stream()
        *keys, after = self._keys(stream[0])
        joined: list[mx.array] = []
        result: object = None
        drew = False
        for (start, stop), key in zip(self._places, keys, strict=True):
            cut = [self._piece(array, start, stop) if self._is_cut(array) else array for array in given]
            piece_args, piece_kwargs = with_arrays((args, kwargs), iter(tied(cut, joined)))
            with draws_from(key):
                result = self.body(*piece_args, **piece_kwargs)
                drew = drew or stream[0] is not key
            parts = argument_arrays(result)
            for part in parts:
                if part.shape[: len(self._axes)] != (*self._axes[:-1], stop - start):
                    raise CheckpointError(
                        f"{self.name} cannot be tiled: given arrays {[*self._axes[:-1], stop - start, '...']} it "
                        f"returned one of shape {list(part.shape)}, so it does not work on each position alone."
                    )
            joined = self._put(joined or [None] * len(parts), parts, start, stop)
        if drew:
            stream[0] = after
        return with_arrays(result, iter(joined))

    def expected(self, arrays: list[mx.array]) -> list[tuple[tuple[int, ...], mx.Dtype]]:
        """The shapes of a piece."""
        length = next(arrays[i].shape[len(self._axes) - 1] for i in self._cut)
        axes = (*self._axes[:-1], length)
        return [((*axes, *shape[len(axes) :]), dtype) for shape, dtype in self.shapes]

    def vjp(
        self,
        moving: set[int],
        reached: list[int],
        arrays: list[mx.array],
        wanted: list[mx.array],
        outputs: list[mx.array],
    ) -> list[mx.array]:
        """The gradients, one piece after the other."""
        # Gradients of what is not trained are made where they are asked for, and nothing waits for them.
        asked = moving - untrained(self.notes)
        wanted = mx.depends(wanted, [])
        done = [*wanted, *(outputs if self._waits else [])]
        found: dict[int, mx.array] = {}
        for (start, stop), key in zip(self._places, self._keys(arrays[-1]), strict=False):
            piece = [self._piece(a, start, stop) if i in self._cut else a for i, a in enumerate(arrays[:-1])]

            def again(*primals: mx.array) -> list[mx.array]:
                results = self.run_again(list(primals), moving, Frame(self.keep))
                self.runs += 1
                # mx.vjp skips outputs of stop_gradient and gives their cotangents to the next: make them others.
                ends: list[mx.array] = mx.depends([results[i] for i in reached], [])
                return ends

            cotangents = [self._piece(cotangent, start, stop) for cotangent in wanted]
            made = mx.vjp(again, tied([*piece, key], done), cotangents)[1]
            for i in sorted(moving):
                if i in self._cut:
                    (found[i],) = self._put([found.get(i)], [made[i]], start, stop)
                else:
                    # Many small sums in half precision would lose what one product keeps.
                    part = made[i].astype(mx.float32) if arrays[i].dtype in _HALVES else made[i]
                    found[i] = found[i] + part if i in found else part
            done = [found[i] for i in sorted(asked)]
        return [found[i].astype(a.dtype) if i in moving else mx.zeros_like(a) for i, a in enumerate(arrays)]

    def _is_cut(self, array: mx.array) -> bool:
        return array.shape[: len(self._axes)] == self._axes

    def _keys(self, key: mx.array) -> list[mx.array]:
        """A key for each piece's draws, and the one that the stream goes on with."""
        return list(mx.random.split(key, len(self._places) + 1))

    def _piece(self, array: mx.array, start: int, stop: int) -> mx.array:
        return array[(*(slice(None),) * (len(self._axes) - 1), slice(start, stop))]

    def _put(self, wholes: Sequence[mx.array | None], parts: list[mx.array], start: int, stop: int) -> list[mx.array]:
        """Arrays for all pieces' results, with those of one put in."""
        if len(self._places) == 1:
            return parts
        filled: list[mx.array] = []
        for whole, part in zip(wholes, parts, strict=True):
            if whole is None:
                # Made when the first result is there, and not at the beginning of the step.
                zero = mx.depends([mx.zeros((), part.dtype)], [part])[0]
                whole = mx.full((*self._axes, *part.shape[len(self._axes) :]), zero)
            whole[(*(slice(None),) * (len(self._axes) - 1), slice(start, stop))] = part
            filled.append(whole)
        return filled


_HALVES = (mx.float16, mx.bfloat16)
