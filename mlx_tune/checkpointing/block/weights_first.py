"""Gradients of a block's weights before the block below is run again.

MLX walks a graph from its ends, through the gradients of all blocks' inputs first. What a block has computed again is
then held until the gradients of its weights are made, for all blocks at once. So here the gradient of an argument is
handed on when those of the weights are there.

MLX asks a function with a gradient of its own for the gradients of all inputs, drops at once those that it does not
need, and does not say which. Waiting for one of them would compute it. So each is given out inside an operation that
Python can see vanish, and an operation around each argument, which MLX comes to right afterwards, waits for what is
left.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from functools import partial
from weakref import ref

import mlx.core as mx

from mlx_tune.checkpointing.block.keep import with_gradient
from mlx_tune.graphs.tracing.recomputation import is_tracing, weights_first


def tied(arrays: list[mx.array], ends: list[mx.array]) -> list[mx.array]:
    """These arrays, once the ends are there.

    In groups, since each output of an operation knows all others: a thousand at once take a million steps.
    """
    return [array for i in range(0, len(arrays), 64) for array in mx.depends(arrays[i : i + 64], ends)]


class WeightsFirst:
    """Makes the gradients of one call's arguments wait for the other gradients that MLX has asked for.

    Args:
        arguments: The indices of those inputs whose gradients may go on to what was computed before the call.
        among: Those and the indices of the inputs whose gradients may be waited for.
    """

    def __init__(self, arguments: AbstractSet[int], among: AbstractSet[int]) -> None:
        self._among = among if len(among) > 1 and not among.isdisjoint(arguments) else set[int]()
        self._arguments = arguments & self._among
        self._latest: ref[_Made] | None = None

    def around(self, arrays: list[mx.array]) -> list[mx.array]:
        """The inputs, with an operation around each argument in which its gradient waits.

        It must not hold gradients: they lead to the outputs of the call, which lead back here, and Python's garbage
        collector does not see into MLX's graph.
        """
        if is_tracing():
            return weights_first(arrays, self._arguments, self._among)
        return [with_gradient(partial(self._wait, i))(a) if i in self._arguments else a for i, a in enumerate(arrays)]

    def given_out(self, gradients: list[mx.array], ignored: AbstractSet[int]) -> list[mx.array]:
        """The gradients of all inputs as MLX is to get them.

        Args:
            gradients: One for each input.
            ignored: The indices of those that are none.
        """
        made = _Made()
        self._latest = ref(made)
        for i in sorted(self._among):
            if i in ignored:
                continue
            # Whatever waits holds what it may wait for, so that this goes when MLX drops all that could.
            given = _Given(made if i in self._arguments else None)
            made.found[i] = ref(given), gradients[i]
            gradients[i] = with_gradient(given)(gradients[i])
        return gradients

    def _wait(self, index: int, cotangent: mx.array) -> mx.array:
        made = self._latest() if self._latest is not None else None
        if made is None or index not in made.found:
            return cotangent
        if (own := made.found[index][0]()) is not None:
            own.made = None
        # A second derivative would hand zeros back to what was only waited for.
        others = [
            mx.stop_gradient(gradient)
            for i, (given, gradient) in made.found.items()
            if i != index and given() is not None
        ]
        waited: list[mx.array] = mx.depends([cotangent], others) if others else [cotangent]
        return waited[0]


class _Made:
    """The gradients of one run, by index, each with whether MLX still has it."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[ref[_Given], mx.array]] = {}


class _Given:
    """Stands in MLX's graph for one gradient: it is there as long as MLX has that."""

    def __init__(self, made: _Made | None) -> None:
        self.made = made

    def __call__(self, cotangent: mx.array) -> mx.array:
        """The gradient of an operation that does nothing."""
        return cotangent
