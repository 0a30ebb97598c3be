"""The longest row that fits, and the ways to train that it was chosen from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_tune.checkpointing.blocks import checkpoint_blocks
from mlx_tune.checkpointing.tile import tile_blocks
from mlx_tune.memory import memory_limit
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import mlx.nn as nn


@dataclass(frozen=True)
class Way:
    """One way to train, and the rows that it takes.

    Attributes:
        name: "plain", "checkpoint" or "checkpoint and tile".
        checkpoint: True where every block is checkpointed.
        tokens: The positions of a piece, where MLPs are tiled.
        max_seq_length: Tokens of the longest row that is predicted to fit; 0 where none is.
        predicted_bytes: The least that a step on such rows holds, as the graph has it.
    """

    name: str
    checkpoint: bool
    tokens: int | None
    max_seq_length: int = 0
    predicted_bytes: int = 0

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Train so while the block runs."""
        with ExitStack() as around:
            if self.checkpoint:
                around.enter_context(checkpoint_blocks(model))
            if self.tokens is not None:
                around.enter_context(tile_blocks(model, self.tokens))
            yield


@dataclass(frozen=True)
class LongestSequence(Tabular):
    """The longest row that fits, and the way to train on it.

    Attributes:
        max_seq_length: Tokens of the row.
        batch_size: Rows in a batch.
        accumulation_steps: Batches to an update.
        way: The way to train, with its prediction.
        peak_bytes: The most that the step which confirmed it held, measured.
        seconds: Its time, compiling included, measured.
        budget_bytes: The memory to stay within, and the limit that the step ran under.
        ways: Every way that was looked at, predicted, not measured.
        truncation: The part of the data that is cut at this length, in words.
        notes: Whatever else there is to know.
    """

    max_seq_length: int
    batch_size: int
    accumulation_steps: int
    way: Way
    peak_bytes: int
    seconds: float
    budget_bytes: int
    ways: tuple[Way, ...]
    truncation: str
    notes: tuple[str, ...] = ()
    _model: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def limit_bytes(self) -> int:
        """The memory limit that the answer holds under."""
        return self.budget_bytes

    @contextmanager
    def applied(self) -> Iterator[LongestSequence]:
        """Train in this way, under the limit that it was confirmed under, while the block runs."""
        assert self._model is not None
        with self.way.applied(self._model), memory_limit(self.limit_bytes):
            yield self

    def to_dict(self) -> dict[str, Json]:
        """Everything, ready for JSON."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__ if name[0] != "_"}
        return plain | {"way": vars(self.way), "ways": [vars(way) for way in self.ways], "notes": list(self.notes)}

    def table(self) -> Table:
        """The answer, and what each way is predicted to take."""
        lines = [
            f"Rows of {self.max_seq_length:,} tokens, {self.batch_size} in a batch, fit "
            f"{format_bytes(self.budget_bytes)}: {self.way.name}. A step held {format_bytes(self.peak_bytes)}, "
            f"measured, in {format_seconds(self.seconds)}, compiling included.",
            f"training rows: {self.truncation}",
            *self.notes,
        ]
        rows = [
            (way.name, f"{way.max_seq_length:,}", format_bytes(way.predicted_bytes))
            if way.max_seq_length
            else (way.name, "none", "")
            for way in self.ways
        ]
        return Table(["way", "longest row, predicted", "floor, predicted"], rows, title="\n".join(lines))
