"""Wiring around code of mlx-lm that raises the wired limit on its own and leaves it there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_tune import devices
from mlx_tune.memory import open_limit_bytes
from mlx_tune.units import format_bytes
from mlx_tune.wiring import wired_limit
from mlx_tune.wiring.context import SLACK

if TYPE_CHECKING:
    import mlx.nn as nn

#: What is wired beside the model for what computing with it makes, as a share of the model.
_HEADROOM = 0.2


@dataclass(frozen=True)
class Wired:
    """What is wired while a model is trained.

    Attributes:
        text: What is wired, or why nothing is.
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
        What is wired, and the way to hold it against mlx-lm.
    """
    import mlx.core as mx

    info = devices.metal_info() or {}
    recommended = int(info.get("max_recommended_working_set_size", 0))
    if recommended <= 0:
        with wired_limit(model, headroom=_HEADROOM) as wired:  # says why there is nothing to wire
            yield Wired(str(wired), lambda: None)
        return
    # There is no way to read the limit. mlx-lm is about to set it to the same value anyway.
    before = mx.set_wired_limit(recommended)
    mx.set_wired_limit(before)
    try:
        limit, wanted = open_limit_bytes(), max(before, int((1 + _HEADROOM) * _bytes_of(model)))
        if limit is not None and limit < SLACK * wanted:
            text = (
                f"not wired: the memory limit of {format_bytes(limit)} leaves less than a quarter above the "
                f"{format_bytes(wanted)} that would be"
            )
            yield Wired(text, lambda: _set(before))
            return
        with wired_limit(model, headroom=_HEADROOM) as wired:
            held = wired.limit_bytes if wired.applied else before
            yield Wired(str(wired), lambda: _set(held))
    finally:
        mx.set_wired_limit(before)


def _bytes_of(model: nn.Module) -> int:
    """A model's parameters, tied ones once."""
    from mlx.utils import tree_flatten

    arrays: Any = tree_flatten(model.parameters())
    return sum({id(array): array.nbytes for _, array in arrays}.values())


def _set(limit_bytes: int) -> None:
    import mlx.core as mx

    mx.set_wired_limit(limit_bytes)
