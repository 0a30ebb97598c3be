"""Several machines that fit together: all of them work with the largest figure that any of them has."""

from __future__ import annotations

from collections.abc import Callable

from mlx_tune.batching.ranks import Ranks
from mlx_tune.timing import StepTrial

#: Figures travel as 64-bit whole numbers: times in millionths of a second, and up to 9 TB still fit.
_MICRO = 1_000_000


class Together:
    """The ranks of one search.

    Where one of them raises, the others raise too instead of waiting for it.

    Args:
        ranks: The processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        """Join."""
        self._ranks = ranks

    def largest(self, figure: Callable[[], float]) -> float:
        """The largest of all ranks' figures: bytes as they are, seconds to the microsecond."""
        own = self._ranks.agree(figure)
        if self._ranks.size == 1:
            return own
        return -self._ranks.smallest(-round(own * _MICRO)) / _MICRO

    def trial(self, run: Callable[[], StepTrial]) -> StepTrial:
        """A step that all ranks run at once: the highest peak and the longest time count."""
        own = self._ranks.agree(run)
        if self._ranks.size == 1:
            return own
        peak = -self._ranks.smallest(-own.peak_bytes)
        seconds = -self._ranks.smallest(-round(own.seconds * _MICRO)) / _MICRO
        return StepTrial(own.limit_bytes, peak, seconds)
