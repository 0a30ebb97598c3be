"""State that differs after the first step, taken as it is from the second step on.

An optimizer that has not run yet makes its state in the first step, and gradients in float32 make float32 of weights or
of an optimizer's state in float16. Then the first step peaks lower than all others, and nobody who asks what training
needs means that one. The contents of the state are seen by tracing the first step; nothing of it is made.
"""

from __future__ import annotations

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_map

from mlx_tune.graphs.arguments import ArraySpec
from mlx_tune.trees import state_arrays, walk
from mlx_tune.units import dtype_name


class FirstStep:
    """The contents of a state before a step, and after it.

    Args:
        state: Objects that the step changes.
    """

    def __init__(self, state: object) -> None:
        self._state = state
        # Some optimizers hold no more after their first step than before.
        self._new = [(new, set(vars(new)["_state"])) for new in _optimizers(state) if not new._initialized]
        self._made: list[tuple[Optimizer, object]] = []
        self._dtypes = {(slot.role, slot.label): slot.array.dtype for slot in state_arrays(state)}
        self._wider: dict[tuple[str, str], mx.Dtype] = {}

    @property
    def differs(self) -> bool:
        """True where the step made an optimizer's state, or left arrays of a wider dtype."""
        return bool(self._made or self._wider)

    def note(self) -> None:
        """See what the state holds, with a step traced and nothing put back yet."""
        self._made = [
            (optimizer, tree_map(lambda a: ArraySpec(tuple(a.shape), a.dtype), vars(optimizer)["_state"]))
            for optimizer, held in self._new
            if optimizer._initialized and vars(optimizer)["_state"].keys() != held
        ]
        for slot in state_arrays(self._state):
            key, dtype = (slot.role, slot.label), slot.array.dtype
            if key in self._dtypes and dtype.size > self._dtypes[key].size:
                self._wider[key] = dtype

    def take(self) -> list[str]:
        """Give the state what it held then, in the places that are there: arrays that nothing evaluates.

        Returns:
            Sentences that say so.
        """
        said = []
        for optimizer, after in self._made:
            held = vars(optimizer)["_state"]
            made = tree_map(lambda s: mx.zeros(s.shape, s.dtype), after)
            held.update({key: held.get(key, value) for key, value in made.items()})
            optimizer._initialized = True
            said.append("The optimizer has not run yet: taken with the state that it has after its first step.")
        wider = [slot for slot in state_arrays(self._state) if (slot.role, slot.label) in self._wider]
        for slot in wider:
            slot.put(mx.zeros(slot.array.shape, self._wider[slot.role, slot.label]))
        if wider:
            first, more = wider[0], len(wider) - 1
            before, after = map(dtype_name, (first.array.dtype, self._wider[first.role, first.label]))
            where = f"{first.label} and {more} more" if more else first.label
            said.append(f"The step makes {after} of {before} in {where}: taken as it is from the second step on.")
        return said


def _optimizers(state: object) -> list[Optimizer]:
    """The optimizers of a state that make arrays themselves."""
    return [n for n in walk(state) if isinstance(n, Optimizer) and not isinstance(n, MultiOptimizer)]
