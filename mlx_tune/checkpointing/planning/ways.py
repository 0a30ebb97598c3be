"""The ways to run one step: which blocks are checkpointed, and with which of two losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mlx_tune.checkpointing.block.wrap import checkpoint, is_checkpointed, unwrap
from mlx_tune.checkpointing.planning.choose import Choice
from mlx_tune.errors import CheckpointError


@dataclass(frozen=True)
class Ways:
    """A step whose blocks can be checkpointed, and which may come with a plain loss and with the linear one.

    A choice among the ways has a truth for each block, True where it is checkpointed. Where there are two losses it has
    one more at its end, True for the linear one: like a checkpoint this holds less, and may take longer.

    Attributes:
        model: The model.
        paths: Where its blocks are.
        step: The step; with the plain loss where there are two.
        linear_step: The same with the linear loss, where that is still to be chosen.
        settled: The loss that was chosen already, where there were two.
    """

    model: nn.Module
    paths: tuple[str, ...]
    step: Callable[..., object]
    linear_step: Callable[..., object] | None = None
    settled: str = ""

    @property
    def none(self) -> Choice:
        """No block checkpointed, and the plain loss."""
        return (False,) * (len(self.paths) + self.two)

    @property
    def all(self) -> Choice:
        """Every block checkpointed, and the linear loss."""
        return (True,) * (len(self.paths) + self.two)

    @property
    def two(self) -> bool:
        """True where the loss is still to be chosen."""
        return self.linear_step is not None

    def with_loss(self, choice: Choice, *, linear: bool) -> Choice:
        """A choice with the other loss, or the same."""
        return (*choice[:-1], linear) if self.two else choice

    def chosen(self, choice: Choice) -> tuple[str, ...]:
        """The paths of the blocks that a choice checkpoints."""
        return tuple(path for path, yes in zip(self.paths, choice[: len(self.paths)], strict=True) if yes)

    def loss(self, choice: Choice) -> str:
        """The loss of a choice: "plain" or "linear"; empty where there is one only."""
        return ("linear" if choice[-1] else "plain") if self.two else self.settled

    def named(self, choice: Choice) -> str:
        """A choice in words."""
        loss = f", {self.loss(choice)} loss" if self.two else ""
        return f"{len(self.chosen(choice))} of {len(self.paths)} blocks checkpointed{loss}"

    @contextmanager
    def applied(self, choice: Choice) -> Iterator[Callable[..., Any]]:
        """Checkpoint what a choice does while the block runs.

        Yields:
            The step to run.
        """
        step = self.linear_step if self.linear_step is not None and choice[-1] else self.step
        undo = apply_choice(self.model, self.chosen(choice))
        try:
            yield step
        finally:
            undo()


def apply_choice(model: nn.Module, paths: tuple[str, ...]) -> Any:
    """Checkpoint the named blocks that are not yet, and have compiled steps traced anew.

    Args:
        model: The model.
        paths: Where the blocks are.

    Returns:
        A function that undoes it and returns how many blocks it undid.

    Raises:
        CheckpointError: The model has no such block; nothing is changed.
    """
    by_path = dict(model.named_modules())
    missing = [path for path in paths if path not in by_path]
    if missing:
        raise CheckpointError(
            f"The model has no block {missing[0]!r} any more: it was changed after the plan was made. Plan again."
        )
    wrapped = [by_path[path] for path in paths if not is_checkpointed(by_path[path])]
    for block in wrapped:
        checkpoint(block)

    def undo() -> int:
        return sum(unwrap(block) for block in wrapped)

    return undo
