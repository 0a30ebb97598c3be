"""From numbers to a choice: the schedule proposes, whole-step estimates and measured steps dispose.

The sums of `schedule` know when blocks hold memory, but not what the rest of a step does meanwhile. So they only
rank choices; which of them fits is asked of the estimate of the whole step, and what it costs of real steps. All
functions here work on numbers and are handed the ways to get more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_tune.checkpointing.planning.schedule import BlockCost, Chain
from mlx_tune.measuring.step import StepTrial

Choice = tuple[bool, ...]

#: How far an estimate may be below the truth. The measured figures are in docs/measurements/estimates.md.
ESTIMATE_MARGIN = 0.03

#: How far above its limit a step's peak lies at most, commonly. MLX looks at the limit after it has allocated.
OVERSHOOT = 0.2


def calibrated(saved_bytes: Sequence[int], extra_seconds: Sequence[float], plain_bytes: int, all_bytes: int) -> Chain:
    """The chain whose sums agree with what is known of the whole step.

    Args:
        saved_bytes: For each block, what checkpointing it alone saves.
        extra_seconds: For each block, what checkpointing it costs.
        plain_bytes: The floor of the step with no block checkpointed.
        all_bytes: The floor with every block checkpointed.

    Returns:
        A chain that prices the first of these choices at `plain_bytes` or above.

    Examples:
        >>> calibrated([10, 10], [0.1, 0.1], plain_bytes=32, all_bytes=15)
        Chain(blocks=(BlockCost(saved_bytes=10, extra_seconds=0.1), BlockCost(saved_bytes=10, extra_seconds=0.1)), \
top_bytes=12, backward_bytes=(15, 15))
    """
    blocks = tuple(BlockCost(max(0, b), max(0.0, s)) for b, s in zip(saved_bytes, extra_seconds, strict=True))
    held = sum(block.saved_bytes for block in blocks)
    top = min(all_bytes, plain_bytes - held)
    own = min(all_bytes, plain_bytes - (held - blocks[-1].saved_bytes))
    return Chain(blocks, top, (own,) * len(blocks))


def cheapest_fitting(choices: Sequence[Choice], floor: Callable[[Choice], int], limit_bytes: int) -> int | None:
    """Bisect choices that need less and less memory for the first one that fits.

    Args:
        choices: From the fastest to the leanest.
        floor: The estimated floor of the whole step under a choice.
        limit_bytes: The limit.

    Returns:
        The index of the first that fits; None where the leanest does not.
    """
    if floor(choices[-1]) > limit_bytes:
        return None
    low, high = 0, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        if floor(choices[middle]) <= limit_bytes:
            high = middle
        else:
            low = middle + 1
    return high


def relaxed(
    choice: Choice, kinds: Sequence[int], seconds: Sequence[float], floor: Callable[[Choice], int], limit_bytes: int
) -> Choice:
    """Leave out what a choice has too much: of each kind the last checkpointed block, while the step still fits.

    Args:
        choice: A choice that fits.
        kinds: For each block, the number of its kind.
        seconds: For each block, what checkpointing it costs.
        floor: The estimated floor of the whole step under a choice.
        limit_bytes: The limit.

    Returns:
        A choice that fits, with as many or fewer blocks checkpointed.
    """
    tried: set[int] = set()
    while True:
        last_of_kind = {kind: i for i, kind in enumerate(kinds) if choice[i] and kind not in tried}
        if not last_of_kind:
            return choice
        kind = max(last_of_kind, key=lambda kind: seconds[last_of_kind[kind]])
        i = last_of_kind[kind]
        fewer = (*choice[:i], False, *choice[i + 1 :])
        if floor(fewer) <= limit_bytes:
            choice = fewer
        else:
            tried.add(kind)


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
            limit = max(1, limit - round(max(1.25 * (peak - budget_bytes), 0.1 * limit)))
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
