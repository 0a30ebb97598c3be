"""From numbers to a choice: the schedule proposes, whole-step estimates and measured steps dispose.

The sums of `schedule` know when blocks hold memory, but not what the rest of a step does meanwhile. So they only
rank choices; which of them fits is asked of the estimate of the whole step, and what it costs of real steps. All
functions here work on numbers and are handed the ways to get more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_tune.checkpointing.planning.schedule import BlockCost, Chain

Choice = tuple[bool, ...]


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
