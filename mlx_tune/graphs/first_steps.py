"""Optimizers that have not run yet, taken with the state that they have from the second step on.

The first step makes that state, so it peaks lower than all others: nobody who asks what training needs means that one.
Which arrays the state will hold is seen by tracing the first step; nothing of them is made.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_map

from mlx_tune.graphs.graph import ArraySpec


class FirstStep:
    """The optimizers of a state that have not run yet, and what they hold after a step.

    Args:
        state: Where to look for them.
    """

    def __init__(self, state: Any) -> None:
        self._new = [optimizer for optimizer in _optimizers(state) if not optimizer._initialized]
        self._after: list[Any] = []

    def __bool__(self) -> bool:
        """True where there are any."""
        return bool(self._new)

    def note(self) -> None:
        """See what they hold, with a step traced and nothing put back yet."""
        self._after = [
            tree_map(lambda a: ArraySpec(tuple(a.shape), a.dtype), vars(optimizer)["_state"])
            if optimizer._initialized
            else None
            for optimizer in self._new
        ]

    def take(self) -> bool:
        """Give each what it held then, in the dictionaries that are there: arrays that nothing evaluates.

        Returns:
            Whether there was anything to give: some optimizers hold no more than before.
        """
        given = False
        for optimizer, after in zip(self._new, self._after, strict=True):
            if after is not None:
                held = vars(optimizer)["_state"]
                given |= after.keys() != held.keys()
                made = tree_map(lambda s: mx.zeros(s.shape, s.dtype), after)
                held.update({key: held.get(key, value) for key, value in made.items()})
                optimizer._initialized = True
        return given


def _optimizers(state: Any) -> list[Optimizer]:
    found: list[Optimizer] = []
    waiting, seen = [state], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, MultiOptimizer):
            waiting.extend(node.optimizers)
        elif isinstance(node, Optimizer):
            found.append(node)
        elif isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, (list, tuple)):
            waiting.extend(node)
    return found
