"""Several machines that fit together: all of them work with the largest figure that any of them has."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import TypeVar

from mlx_tune.measuring.outcomes import is_out_of_memory
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.measuring.step import StepTrial

T = TypeVar("T")

#: Figures travel as 64-bit whole numbers: times in millionths of a second, and up to 9 TB still fit.
_MICRO = 1_000_000


class Together:
    """The ranks of one search.

    Where one of them raises, the others raise too instead of waiting for it.

    Args:
        ranks: The processes.
        recover: Puts back what a step changes; called after one that ran out of memory in the middle.
    """

    #: What a step that ran out of memory is said to have taken: longer than any that did not.
    OUT_OF_MEMORY_SECONDS = 1e6

    def __init__(self, ranks: Ranks, recover: Callable[[], None] = lambda: None) -> None:
        """Join."""
        self._ranks, self._recover = ranks, recover

    def everywhere(self, function: Callable[[], T]) -> T:
        """Call a function on all ranks; where it raises on one, all raise."""
        return self._ranks.agree(function)

    def largest(self, figure: Callable[[], float]) -> float:
        """The largest of all ranks' figures: bytes as they are, seconds to the microsecond."""
        own = self._ranks.agree(figure)
        if self._ranks.size == 1:
            return own
        return -self._ranks.smallest(-round(own * _MICRO)) / _MICRO

    def trial(self, run: Callable[[], StepTrial], *, budget_bytes: int) -> StepTrial:
        """A step that all ranks run at once: the highest peak and the longest time count.

        One that runs out of memory on any of them has a peak of twice the budget.
        """
        own = self._ranks.agree(lambda: self._within_memory(run, budget_bytes))
        if self._ranks.size == 1:
            return own
        peak = -self._ranks.smallest(-own.peak_bytes)
        seconds = -self._ranks.smallest(-round(own.seconds * _MICRO)) / _MICRO
        return StepTrial(own.limit_bytes, peak, seconds)

    def _within_memory(self, run: Callable[[], StepTrial], budget_bytes: int) -> StepTrial:
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the arrays that did not fit
        import mlx.core as mx

        self._recover()  # the model waits for what the step was to compute
        gc.collect()
        mx.clear_cache()
        return StepTrial(None, 2 * budget_bytes, self.OUT_OF_MEMORY_SECONDS)
