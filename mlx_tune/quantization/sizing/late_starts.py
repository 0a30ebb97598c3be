"""Runs of a model that begin where something in it was changed: the blocks before hand on what they did unchanged.

Where one layer after another is changed alone, most of each run is what every other one computed as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.learning.kept_arrays import KeptArrays
from mlx_tune.quantization.models.interception import Step
from mlx_tune.quantization.models.sites import ROOM_BYTES
from mlx_tune.quantization.planning.plan import LayerPlan
from mlx_tune.substitution import ModuleCall, intercepted


class LateStarts:
    """A divergence that is measured without running the blocks before a changed layer.

    What blocks that run instead rely on is checked: blocks that are left out hand on what is no number, and a figure
    that is none is measured anew with the whole model.

    Args:
        steps: The order in which the model calls its blocks and the layers outside of them. It is unchanged when the
            context is entered.
        blocks: Its blocks by path.
        divergence: Runs the model, always on the same batches in the same order, and tells how far its answers moved.

    Attributes:
        places: The places of blocks in their chain from which on a run can start, by path.
    """

    def __init__(
        self, steps: Sequence[Step], blocks: Sequence[tuple[str, nn.Module]], divergence: Callable[[], float]
    ) -> None:
        """Find the chain of blocks; nothing is run."""
        self._divergence = divergence
        self._stack = ExitStack()
        self._order = [step.path for step in steps]
        self._chain = _chain(steps, {path for path, _ in blocks})
        self.places = {step.path: i for i, step in enumerate(self._chain)}
        self._place_of = {id(step.module): i for i, step in enumerate(self._chain)}
        self._kept: KeptArrays | None = None
        self._shapes: dict[tuple[int, int], tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        """Run the model once, and keep what its blocks hand on."""
        if len(self._chain) < 2:
            return self
        kept = self._stack.enter_context(KeptArrays(ROOM_BYTES))
        part = -1

        def keep(call: ModuleCall) -> object:
            nonlocal part
            place = self._place_of[id(call.module)]
            part += place == 0
            output = call.run()
            if isinstance(output, mx.array):
                mx.eval(output)
                self._shapes[part, place] = output.shape
                kept[part, place] = output
            return output

        with intercepted([step.module for step in self._chain], keep):
            self._divergence()
        # A block that hands on more than one array can only be the last.
        if len(self._shapes) >= (part + 1) * (len(self._chain) - 1) > 0:
            self._kept = kept
        return self

    def __exit__(self, *_: object) -> None:
        """Forget what was kept."""
        self._kept = None
        self._stack.close()

    def divergence(self, layer: LayerPlan) -> float:
        """The divergence of the model, of which this layer alone is changed.

        Args:
            layer: One of the layers.
        """
        start = self._start(layer)
        kept = self._kept
        if start < 1 or kept is None:
            return self._divergence()
        part = -1

        def skip(call: ModuleCall) -> object:
            nonlocal part
            place = self._place_of[id(call.module)]
            part += place == 0
            if place == start - 1:
                return kept[part, place]
            return mx.full(self._shapes[part, place], float("nan")) if place < start else call.run()

        with intercepted([step.module for step in self._chain[:start]], skip):
            found = self._divergence()
        return found if math.isfinite(found) else self._divergence()

    def _start(self, layer: LayerPlan) -> int:
        """The first block that a change of the layer reaches; 0 where that may be any."""
        places = [self._place(path) for site in layer.sites for path in site.paths]
        start = min(places, default=0)
        return start if start < len(self._chain) or (0, start - 1) in self._shapes else 0

    def _place(self, path: str) -> int:
        inside = next((step.path for step in self._chain if f"{path}.".startswith(f"{step.path}.")), None)
        if inside is not None:
            return self.places[inside]
        # In no block: after all of them where it is called after the last.
        last = self._order.index(self._chain[-1].path) if self._chain else len(self._order)
        return len(self._chain) if path in self._order and self._order.index(path) > last else 0


def _chain(steps: Sequence[Step], blocks: set[str]) -> list[Step]:
    """The blocks that follow one another up to the last of all, each called once and given nothing else that is new."""
    chain: list[Step] = []
    for step in reversed([step for step in steps if step.path in blocks]):
        if step.calls != 1:
            break
        chain.insert(0, step)
        if step.follows is None:
            break
    return chain
