"""Wiring around code of mlx-lm that raises the wired limit on its own and leaves it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_tune.memory import open_limit_bytes
from mlx_tune.trees import nbytes_of
from mlx_tune.units import format_bytes, format_limit
from mlx_tune.wiring.context import SLACK, registry, wired_limit
from mlx_tune.wiring.limits import read_capacity
from mlx_tune.wiring.registry import WiredRequest

if TYPE_CHECKING:
    import mlx.nn as nn

#: What is wired beside the model for what computing with it makes, as a share of the model.
_HEADROOM = 0.2


@dataclass(frozen=True)
class Wired:
    """The memory that is wired while a model is trained.

    Attributes:
        text: The wired memory, or the reason why there is none.
        hold: Sets the limit that was decided on once more, after mlx-lm has set its own.
    """

    text: str
    hold: Callable[[], None]


@contextmanager
def wired_for_training(model: nn.Module) -> Iterator[Wired]:
    """Wire a model while the block runs, unless a memory limit is tight, and leave the limit as it was.

    Under a tight memory limit MLX makes and releases buffers all the time, which while wired is what the kernel panic
    of mlx#3186 is about.

    Args:
        model: The model.

    Yields:
        The wired memory, and the way to hold it against mlx-lm.
    """
    capacity = read_capacity()
    if capacity.reason:
        with wired_limit(model, headroom=_HEADROOM) as wired:  # says why there is nothing to wire
            yield Wired(str(wired), lambda: None)
        return
    # A request for nothing brings back what mlx-lm raises and leaves, where nothing is wired too, and whatever other
    # blocks come and go meanwhile.
    token = registry.make_token()
    try:
        before = registry.enter(token, WiredRequest(), capacity.cap_bytes)
        limit, wanted = open_limit_bytes(), max(before, int((1 + _HEADROOM) * nbytes_of(model)))
        if limit is not None and limit < SLACK * wanted:
            text = (
                f"not wired: the memory limit of {format_limit(limit)} leaves less than a quarter above the "
                f"{format_bytes(wanted)} that would be"
            )
            yield Wired(text, registry.hold)
            return
        with wired_limit(model, headroom=_HEADROOM) as wired:
            yield Wired(str(wired), registry.hold)
    finally:
        registry.leave(token)
