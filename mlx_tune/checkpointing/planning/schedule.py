"""Which blocks to checkpoint for how much memory: an exact dynamic programme over numbers.

This file does not know MLX. A step runs its blocks forward, then backward from the last to the first. A plain block
holds what its gradient needs from its forward pass on until its own backward pass; a checkpointed one computes it
again. So memory is a running sum that has two places to be largest:

- at the top, after the last block, where every plain block's saved bytes are held together with what the loss needs;
- at a block's own backward pass, where the plain blocks *before* it hold theirs, and the block itself has its own
  either way, kept or computed again. Checkpointing a block therefore never lowers memory at that block, and the
  last block's saving counts at the top only.

This is a knapsack with one capacity for every prefix (rotor and checkmate solve relatives of it: Beaumont et al.,
"Optimal checkpointing for heterogeneous chains", 2019; Jain et al., "Checkmate", 2020). It is solved exactly by
keeping, block by block, the pairs of held bytes and seconds that no other pair beats in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.pareto import unbeaten

#: Pairs kept after each block. Beyond, held bytes are rounded up to this many steps of the limit: never too
#: optimistic, and at most one step for each block away from the exact answer.
MOST_PAIRS = 4096

_Pair = tuple[int, float, tuple[Any, ...] | None]  # held bytes, seconds, and the choices that led there, linked


@dataclass(frozen=True)
class BlockCost:
    """The savings and the cost of checkpointing one block.

    Attributes:
        saved_bytes: The bytes that the plain block holds between its forward and backward pass beyond what the
            checkpointed one does.
        extra_seconds: The seconds that the step takes longer with the block checkpointed.
    """

    saved_bytes: int
    extra_seconds: float


@dataclass(frozen=True)
class Chain:
    """The blocks of a step in the order they run, and the memory that no choice changes.

    Attributes:
        blocks: The cost of each block.
        top_bytes: Everything held after the last block, without the blocks' saved bytes.
        backward_bytes: Everything held during a block's backward pass, without the saved bytes of those before it;
            one number for each block.
    """

    blocks: tuple[BlockCost, ...]
    top_bytes: int
    backward_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse figures that cannot be."""
        if len(self.backward_bytes) != len(self.blocks):
            raise InvalidArgumentError(
                f"backward_bytes has {len(self.backward_bytes)} entries for {len(self.blocks)} blocks."
            )
        for i, block in enumerate(self.blocks):
            if block.saved_bytes < 0 or not block.extra_seconds >= 0:
                raise InvalidArgumentError(f"Block {i} has a negative cost: {block}.")


@dataclass(frozen=True)
class Schedule:
    """One choice of blocks, with its price.

    Attributes:
        checkpointed: For each block, whether it is checkpointed.
        peak_bytes: The most memory held at once.
        extra_seconds: The seconds that the step takes longer than without any checkpointing.
    """

    checkpointed: tuple[bool, ...]
    peak_bytes: int
    extra_seconds: float


def price(chain: Chain, checkpointed: Sequence[bool]) -> Schedule:
    """The memory and time that one choice of blocks needs.

    Args:
        chain: The blocks.
        checkpointed: For each block, whether it is checkpointed.

    Returns:
        The choice with its peak and its seconds.

    Examples:
        >>> chain = Chain((BlockCost(10, 0.1), BlockCost(10, 0.1)), top_bytes=5, backward_bytes=(12, 12))
        >>> price(chain, (False, False)).peak_bytes, price(chain, (True, False)).peak_bytes
        (25, 15)
    """
    held = peak = 0
    seconds = 0.0
    for block, own, yes in zip(chain.blocks, chain.backward_bytes, checkpointed, strict=True):
        peak = max(peak, own + held)
        if yes:
            seconds += block.extra_seconds
        else:
            held += block.saved_bytes
    return Schedule(tuple(bool(yes) for yes in checkpointed), max(peak, chain.top_bytes + held), seconds)


def fastest(chain: Chain, limit_bytes: int, *, most_pairs: int = MOST_PAIRS) -> Schedule | None:
    """The choice that costs the least time among those whose peak is at most `limit_bytes`.

    Args:
        chain: The blocks.
        limit_bytes: The limit of the peak.
        most_pairs: From how many candidates on held bytes are rounded up.

    Returns:
        The choice, of two that take as long the one that holds less at the top; None where nothing fits.

    Examples:
        >>> chain = Chain((BlockCost(10, 0.1), BlockCost(10, 0.1)), top_bytes=5, backward_bytes=(12, 12))
        >>> fastest(chain, 20).checkpointed
        (True, False)
    """
    # Choices are linked from the last to the first, so that pairs share what they have in common.
    pairs: list[_Pair] = [(0, 0.0, None)]
    for block, own in zip(chain.blocks, chain.backward_bytes, strict=True):
        pairs = [pair for pair in pairs if own + pair[0] <= limit_bytes]
        grown: list[_Pair] = [(held + block.saved_bytes, seconds, (False, path)) for held, seconds, path in pairs]
        grown += [(held, seconds + block.extra_seconds, (True, path)) for held, seconds, path in pairs]
        pairs = _undominated(grown)
        if len(pairs) > most_pairs:
            step = max(1, -(-limit_bytes // most_pairs))
            pairs = _undominated([(-(-held // step) * step, seconds, path) for held, seconds, path in pairs])
    pairs = [pair for pair in pairs if chain.top_bytes + pair[0] <= limit_bytes]
    if not pairs:
        return None
    path = min(pairs, key=lambda pair: (pair[1], pair[0]))[2]
    chosen: list[bool] = []
    while path is not None:
        chosen.append(path[0])
        path = path[1]
    return price(chain, chosen[::-1])


def _undominated(pairs: list[_Pair]) -> list[_Pair]:
    """Those that no other one beats in both held bytes and seconds."""
    return [pairs[i] for i in unbeaten([(held, seconds) for held, seconds, _ in pairs])]


def frontier(chain: Chain, resolution_bytes: int = 1) -> tuple[Schedule, ...]:
    """Every choice worth making, from the fastest to the one that needs the least memory.

    Args:
        chain: The blocks.
        resolution_bytes: Choices that need less than this much less memory than the one before may be left out;
            1 leaves none out.

    Returns:
        Choices of which each needs less memory and more time than the one before; the first is the fastest at all.

    Examples:
        >>> chain = Chain((BlockCost(10, 0.1), BlockCost(10, 0.1)), top_bytes=5, backward_bytes=(12, 12))
        >>> [(s.peak_bytes, s.extra_seconds) for s in frontier(chain)]
        [(25, 0.0), (15, 0.1), (12, 0.2)]
    """
    found: list[Schedule] = []
    limit = price(chain, [False] * len(chain.blocks)).peak_bytes
    while (best := fastest(chain, limit)) is not None:
        while found and found[-1].extra_seconds >= best.extra_seconds:
            found.pop()
        found.append(best)
        limit = best.peak_bytes - resolution_bytes
    return tuple(found)
