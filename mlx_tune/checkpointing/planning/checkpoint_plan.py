"""The result of `plan_checkpoints`: which blocks, what that was predicted to need and what it needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import mlx.nn as nn

from mlx_tune.checkpointing.block.wrap import unwrap
from mlx_tune.checkpointing.planning.ways import apply_choice
from mlx_tune.memory import held_limits
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tabular import Table, Tabular
from mlx_tune.units import format_bytes, format_seconds


@dataclass(frozen=True)
class PlannedBlock:
    """One block of the plan.

    Attributes:
        path: Where it is in the model.
        checkpointed: True where the plan checkpoints it.
        saved_bytes: The bytes by which the step's floor is lower with this block checkpointed, from the graph.
        extra_seconds: The seconds that the step takes longer with it checkpointed: its forward passes, measured alone.
        kind: Blocks of one number do the same work; one of them was measured.
    """

    path: str
    checkpointed: bool
    saved_bytes: int
    extra_seconds: float
    kind: int


@dataclass(frozen=True)
class MeasuredChoice:
    """A choice of blocks that was run for real.

    Attributes:
        checkpointed: The number of checkpointed blocks.
        floor_bytes: The least the step needs under this choice, from its graph.
        limit_bytes: The highest memory limit tried that kept its peak within the budget.
        peak_bytes: The highest peak under that limit.
        seconds: The fastest step under that limit.
        fits: True where a limit was found under which the peak is within the budget.
        loss: "plain" or "linear", where there were two.
    """

    checkpointed: int
    floor_bytes: int
    limit_bytes: int
    peak_bytes: int
    seconds: float
    fits: bool
    loss: str = ""


@dataclass(frozen=True)
class CheckpointPlan(Tabular):
    """Which blocks to checkpoint, and under which memory limit, for a step to fit its budget and be fast.

    Attributes:
        blocks: Every block of the model, in the order they run.
        batch_size: The batch it was planned for.
        predicted_peak_bytes: The floor of the step's memory from its graph: the peak that it cannot go below.
        peak_bytes: The peak of the real steps under `limit_bytes`, measured.
        predicted_seconds: Seconds of a step, from the time of another choice and the blocks' forward passes; None
            where no other choice was run, because this one fits with room to spare.
        measured_seconds: Seconds of the fastest real step under `limit_bytes`.
        limit_bytes: The memory limit under which the measured figures hold.
        cache_limit_bytes: The cache limit that goes with it, or None where none is needed.
        budget_bytes: The limit of the peak.
        trials: Every choice that was run, in the order tried.
        notes: Further remarks.
        loss: "plain" or "linear" where the step came with both; else empty.
    """

    blocks: tuple[PlannedBlock, ...]
    batch_size: int
    predicted_peak_bytes: int
    peak_bytes: int
    predicted_seconds: float | None
    measured_seconds: float
    limit_bytes: int
    cache_limit_bytes: int | None
    budget_bytes: int
    trials: tuple[MeasuredChoice, ...]
    notes: tuple[str, ...]
    loss: str = field(default="", kw_only=True)
    _model: nn.Module = field(repr=False, compare=False)

    @property
    def paths(self) -> tuple[str, ...]:
        """The blocks to checkpoint."""
        return tuple(block.path for block in self.blocks if block.checkpointed)

    def apply(self) -> AppliedPlan:
        """Checkpoint the plan's blocks in the model it was made for.

        Compiled steps are traced anew if the model's state is among their `inputs`, as it has to be for training.
        The memory limit is not set: train in `with plan.applied():`, or under `memory_limit(plan.limit_bytes)`.

        Returns:
            A handle: `.undo()`, or a `with` block that undoes it at its end.
        """
        return AppliedPlan(self)

    def undo(self) -> int:
        """Undo `apply`; returns how many blocks were checkpointed."""
        by_path = dict(self._model.named_modules())
        return sum(unwrap(by_path[path]) for path in self.paths if path in by_path)

    @contextmanager
    def applied(self) -> Iterator[CheckpointPlan]:
        """Checkpoint the blocks and hold the limits that the plan was measured under, while the block trains.

        Yields:
            This plan.
        """
        with self.apply(), held_limits(self.limit_bytes, self.cache_limit_bytes):
            yield self

    def table(self) -> Table:
        """The table of blocks, and the figures below it."""
        rows: list[list[object]] = []
        for first, last, block in _runs(self.blocks):
            path = first.path if first is last else f"{first.path} to {last.path}"
            rows.append(
                [
                    path,
                    "checkpoint" if block.checkpointed else "",
                    format_bytes(block.saved_bytes),
                    format_seconds(block.extra_seconds),
                ]
            )
        count = len(self.paths)
        notes = [
            f"Peak: at least {format_bytes(self.predicted_peak_bytes)} predicted, "
            f"{format_bytes(self.peak_bytes)} measured under a memory limit of "
            f"{format_bytes(self.limit_bytes)}; the budget is {format_bytes(self.budget_bytes)}. In Python, train "
            f"inside plan.applied().",
            (
                "Step: "
                if self.predicted_seconds is None
                else f"Step: {format_seconds(self.predicted_seconds)} predicted, "
            )
            + f"{format_seconds(self.measured_seconds)} measured.",
        ]
        for choice in self.trials:
            outcome = (
                f"{format_seconds(choice.seconds)} a step" if choice.fits else "over the budget under each limit tried"
            )
            loss = f" with the {choice.loss} loss" if choice.loss else ""
            notes.append(
                f"Tried {choice.checkpointed} of {len(self.blocks)} checkpointed{loss}: {outcome}, "
                f"peak {format_bytes(choice.peak_bytes)} under a limit of {format_bytes(choice.limit_bytes)}."
            )
        return Table(
            ["block", "plan", "saves", "costs a step"],
            rows,
            title=f"Checkpoint plan at batch size {self.batch_size}: {count} of {len(self.blocks)} blocks"
            + (f", {self.loss} loss" if self.loss else ""),
            notes=[*notes, *self.notes],
        )

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        plain = ["batch_size", "predicted_peak_bytes", "peak_bytes", "predicted_seconds"]
        plain += ["measured_seconds", "limit_bytes", "cache_limit_bytes", "budget_bytes", "loss"]
        return {
            "blocks": [asdict(block) for block in self.blocks],
            **{name: getattr(self, name) for name in plain},
            "trials": [asdict(choice) for choice in self.trials],
            "notes": list(self.notes),
        }


class AppliedPlan:
    """Blocks that a plan has checkpointed, until they are undone."""

    def __init__(self, plan: CheckpointPlan) -> None:
        """Checkpoint them."""
        self.plan = plan
        self._undo: Callable[[], int] = apply_choice(plan._model, plan.paths)

    def undo(self) -> int:
        """Make the blocks what they were before; returns how many were undone. A second call does nothing."""
        undo, self._undo = self._undo, lambda: 0
        return undo()

    def __enter__(self) -> AppliedPlan:
        """Return the plan: the blocks are checkpointed already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo."""
        self.undo()


def _runs(blocks: tuple[PlannedBlock, ...]) -> Iterator[tuple[PlannedBlock, PlannedBlock, PlannedBlock]]:
    """Neighbouring blocks that share everything but their path, as the first, the last and one of them."""
    for _, group in itertools.groupby(blocks, lambda b: (b.kind, b.checkpointed, b.saved_bytes, b.extra_seconds)):
        members = list(group)
        yield members[0], members[-1], members[0]
