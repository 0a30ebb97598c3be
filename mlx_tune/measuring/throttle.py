"""The rise of a step's peak with its memory limit: learned where it is cheap, used where it counts.

MLX holds dispatch back while active memory is above the limit, but looks only after an operation's outputs are
allocated, and memory is given back a moment after a task is counted as done. So a peak lies above its limit by an
amount that depends on the model: 3 % for a small transformer, 30 % for a convolutional net, of what the step adds
to what was there before. That share hardly depends on the batch size, so small batches tell it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_tune.measuring.step import StepTrial

#: Limits to learn from, as shares of what the step adds at its floor: from every operation held back to none.
SHARES = (0.0, 0.3, 0.6, 0.9, 1.2, math.inf)
#: The share at which steps are held to their floor, or nearly so, and hardly lose any time by it; most models allow it.
HOLDING = 0.9
#: Peaks this close together are taken for the same.
_SAME = 0.01
#: The most that a reading is expected to rise over the one at the share before.
_RISE = 0.6

#: How far above its limit a step's peak lies at most, commonly. MLX looks at the limit after it has allocated.
OVERSHOOT = 0.2


@dataclass
class Throttle:
    """Peaks seen under limits, both in units of what the step adds at its floor.

    Attributes:
        worst: For each share that was tried, the largest peak.

    Examples:
        >>> throttle = Throttle({0.0: 1.0, 0.3: 1.0, 0.6: 1.1, 0.9: 1.3})
        >>> throttle.share_within(1.2), throttle.limit_at(0.6, base_bytes=100, floor_bytes=200, budget_bytes=220)
        (0.6, 160)
    """

    worst: dict[float, float] = field(default_factory=dict)

    def note(self, share: float, peak: float) -> None:
        """Remember a peak at a share."""
        self.worst[share] = max(peak, self.worst.get(share, 1.0))

    @property
    def spread(self) -> float:
        """The peak to reckon with where every operation is held back: 1 if single readings never exceed the floor."""
        return self.worst.get(0.0, 1.0)

    @property
    def holding_share(self) -> float:
        """The largest share whose peaks are no higher than with everything held back; it costs much less time."""
        return min(self.share_within(self.spread + _SAME), HOLDING)

    def holds(self, share: float) -> bool:
        """True where the peaks seen at a share are no higher than with everything held back."""
        return self.worst[share] <= self.spread + _SAME

    def may_try(self, room: float) -> bool:
        """True where one more reading, at the next share, can be expected to stay within `room`."""
        return max(self.worst.values(), default=1.0) + _RISE <= room

    def share_within(self, room: float, below: float | None = None) -> float:
        """The largest share whose peaks, and those of all smaller shares, stayed within `room`; 0 if none did.

        Args:
            room: In units of what the step adds at its floor.
            below: Only shares below this one.
        """
        found = 0.0
        for share in sorted(self.worst):
            if self.worst[share] > room or (below is not None and share >= below):
                break
            found = share
        return found

    @staticmethod
    def limit_at(share: float, base_bytes: int, floor_bytes: int, budget_bytes: int) -> int:
        """The memory limit that a share stands for.

        Args:
            share: One of `SHARES`.
            base_bytes: The memory that is held before the step.
            floor_bytes: The least that the step's peak can be.
            budget_bytes: The highest limit.
        """
        if share == 0:
            return 1
        added = max(0, floor_bytes - base_bytes)
        return min(budget_bytes, base_bytes + int(share * added)) if share < math.inf and added else budget_bytes


def limit_trials(
    run: Callable[[int], StepTrial], floor_bytes: int, budget_bytes: int, most: int = 4
) -> list[StepTrial]:
    """Look for the highest memory limit under which a step's peak stays within the budget.

    Begins low enough for a common overshoot, and moves the limit by what was measured.

    Args:
        run: Measures a step under a limit.
        floor_bytes: The step's needs in any case.
        budget_bytes: The limit of the peak.
        most: The most limits to try.

    Returns:
        The trials in the order tried.
    """
    limit = min(budget_bytes, max(floor_bytes, int(budget_bytes / (1 + OVERSHOOT))))
    trials: list[StepTrial] = []
    while len(trials) < most:
        trials.append(run(limit))
        peak = trials[-1].peak_bytes
        if peak <= budget_bytes:
            # An overshoot is the size of what was queued last: about the same under a slightly higher limit.
            higher = budget_bytes - round(1.25 * (peak - limit))
            higher = min(higher, (limit + _broken(trials, budget_bytes)) // 2)
            if peak <= limit or higher < 1.02 * limit:
                break
            limit = higher
        else:
            if any(t.peak_bytes <= budget_bytes for t in trials) or limit < 0.7 * floor_bytes:
                break
            limit = lowered(limit, peak, budget_bytes, least=round(0.1 * limit))
    return trials


def best_trial(trials: Sequence[StepTrial], budget_bytes: int) -> StepTrial | None:
    """The trial with the highest limit among those that stay within the budget: less throttling is never slower.

    Peaks scatter: a limit under which one stayed within the budget is no better than a lower one under which one did
    not.
    """
    broken = _broken(trials, budget_bytes)
    fitting = [t for t in trials if t.peak_bytes <= budget_bytes and (t.limit_bytes or 0) < broken]
    return max(fitting, key=lambda t: t.limit_bytes or 0, default=None)


def _broken(trials: Sequence[StepTrial], budget_bytes: int) -> int:
    """The lowest limit under which a peak left the budget; twice the budget where none did."""
    over = [t.limit_bytes or 0 for t in trials if t.peak_bytes > budget_bytes]
    return min(over, default=2 * budget_bytes)


def lowered(limit_bytes: int, peak_bytes: int, budget_bytes: int, *, least: int = 1) -> int:
    """The limit to try after one under which a peak left the budget.

    Args:
        limit_bytes: That limit.
        peak_bytes: The peak.
        budget_bytes: The budget.
        least: The bytes to lower it by at the least.

    Examples:
        >>> lowered(900, 1035, 1000)
        856
    """
    return max(1, limit_bytes - max(round(1.25 * (peak_bytes - budget_bytes)), least))
