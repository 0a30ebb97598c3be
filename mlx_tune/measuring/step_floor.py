"""The floor of one real step at any batch size, from a trace of it."""

from __future__ import annotations

import gc
from collections.abc import Callable

from mlx_tune.measuring.floors import Floor
from mlx_tune.trees import nbytes_of

#: State that the first trace foresaw to within this share of the floor needs no second one.
_FORESEEN = 0.003


class StepFloor:
    """The floor of one step as a function of the batch size, from a trace of the step at that size.

    Memory that the process holds besides counts, too: a trial's peak includes it.

    Args:
        step: Runs one training step on a batch.
        make_batch: Makes a batch of n rows.
        state: Objects that the step updates.
    """

    def __init__(self, step: Callable[..., object], make_batch: Callable[[int], object], state: object) -> None:
        """Keep the step; nothing is traced yet."""
        self.step, self.make_batch, self.state = step, make_batch, state
        self._state_bytes = self._floor_bytes = 0  # by the last trace

    def __call__(self, size: int) -> Floor:
        """Trace the step at a size.

        Raises:
            TraceError: The step cannot be described without running it.
        """
        import mlx.core as mx

        from mlx_tune.graphs.estimate import follow_step

        gc.collect()
        held = mx.get_active_memory()
        batch = self.make_batch(size)
        own = nbytes_of(batch)
        graph, timeline = follow_step(self.step, (batch,), self.state)
        # State that a first step has yet to make is in the graph already, and will be beside the rest as well.
        of_state = [graph.values[i] for i in graph.inputs() if graph.values[i].role not in ("batch", "captured")]
        self._state_bytes = sum(value.nbytes for value in of_state)
        to_come = max(0, self._state_bytes - nbytes_of(self.state))
        besides = max(0, held + to_come - (timeline.start_bytes - own))
        live = [timeline.start_bytes, *timeline.live]
        self._floor_bytes = timeline.peak_bytes + besides
        return Floor(self._floor_bytes, [bytes_ + besides for bytes_ in live])

    @property
    def stale(self) -> bool:
        """True where the state is not what the last trace reckoned with, so that it has to be traced again."""
        return abs(nbytes_of(self.state) - self._state_bytes) > _FORESEEN * self._floor_bytes
