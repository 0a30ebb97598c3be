"""Courses of mlx-lm's training step on a model that was never loaded, by rows and length."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_tune.devices import Backend
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.adapters import add_adapters, make_optimizer
from mlx_tune.lm.capacity.depth import Course, Depths
from mlx_tune.lm.capacity.repetition import Run, find_runs, kept_blocks
from mlx_tune.lm.capacity.tracing import course_of
from mlx_tune.lm.capacity.unloaded import Unloaded
from mlx_tune.lm.preparation import MOST_LAYERS, StandInRows
from mlx_tune.trees import nbytes_of

if TYPE_CHECKING:
    import mlx.nn as nn

#: Blocks of a run of trained blocks in the two short models, and repeats of its pattern at the least.
_SHORT = ((6, 2), (12, 4))
#: A run of no more trained blocks stays as it is: what they hold is followed, and only the others are counted.
_FOLLOWED = 16
#: The errors of an architecture that cannot be built with fewer blocks.
_UNFIT = (InvalidArgumentError, TypeError, ValueError, KeyError, IndexError, AttributeError)
#: Repeats of a run that is not trained.
_STILL = 2


@dataclass(frozen=True)
class Tuning:
    """The way of training.

    Attributes:
        fine_tune_type: "lora", "dora" or "full".
        num_layers: Blocks that are trained, from the last; None for mlx-lm's 16, or all where there are fewer; -1 for
            all.
        rank: Rank of the adapters.
        optimizer: mlx-lm's name of the optimizer.
    """

    fine_tune_type: str = "lora"
    num_layers: int | None = None
    rank: int = 8
    optimizer: str = "adam"


class TrainedModel:
    """A model made ready for training, whole or with fewer blocks, none of it loaded.

    Args:
        unloaded: Its configuration.
        tuning: The way of training.

    Attributes:
        whole: The model.
        weights_bytes: Its weights, adapters apart.
        depths: The shorter models that say what the whole one needs.
    """

    def __init__(self, unloaded: Unloaded, tuning: Tuning) -> None:
        self.whole = unloaded.build()
        self.unloaded, self.tuning = unloaded.completed(self.whole), tuning
        self.weights_bytes = nbytes_of(self.whole.parameters())
        self._count = count = len(self.whole.layers)
        trained = min(MOST_LAYERS, count) if tuning.num_layers is None else tuning.num_layers
        self._add(self.whole, trained)
        self._trained = count if trained == -1 else trained
        self._models: dict[tuple[int, ...], nn.Module] = {tuple(range(count)): self.whole}
        blocks = list(self.whole.layers)
        kinds = self.unloaded.kinds(self.whole)
        self._runs = find_runs(kinds, _STILL)
        trains = [
            bool(blocks[run.start].trainable_parameters()) and run.start >= count - self._trained for run in self._runs
        ]
        self.depths = _depths(self._runs, trains, [nbytes_of(b.parameters()) for b in blocks])
        if not self._same_blocks(kinds):
            self._runs, self.depths = (), _depths((), [], [])

    def shorter(self, repeats: Sequence[int]) -> nn.Module:
        """The model in which each run of equal blocks comes only so often."""
        keep = kept_blocks(self._count, self._runs, repeats)
        if keep not in self._models:
            model = self.unloaded.build(keep)
            self._add(model, sum(i >= self._count - self._trained for i in keep))
            self._models[keep] = model
        return self._models[keep]

    def add_adapters(self, model: nn.Module) -> None:
        """Make a model with all blocks ready for training, in place."""
        self._add(model, self._trained)

    def _add(self, model: nn.Module, trained: int) -> None:
        add_adapters(model, self.tuning.fine_tune_type, num_layers=trained, lora_parameters={"rank": self.tuning.rank})

    def _same_blocks(self, kinds: Sequence[object]) -> bool:
        """True where the configuration of a short model does make the blocks that it should have."""
        keep = kept_blocks(self._count, self._runs, self.depths.low)
        try:
            made = self.unloaded.kinds(self.shorter(self.depths.low), keep)
        except _UNFIT:  # settings that do not go together in a shorter model: it is traced whole
            return False
        return made == [kinds[i] for i in keep]


def _depths(runs: Sequence[Run], trains: Sequence[bool], block_bytes: Sequence[int]) -> Depths:
    def repeats(run: Run, trained: bool, which: int) -> int:
        blocks, least = _SHORT[which]
        if not trained:
            return _STILL
        return run.repeats if run.repeats * run.period <= _FOLLOWED else max(least, -(-blocks // run.period))

    # One run of trained blocks is shortened, the longest: two slopes would take a third short model.
    longest = max((run.repeats * run.period for run, yes in zip(runs, trains, strict=True) if yes), default=0)

    def short(which: int) -> tuple[int, ...]:
        return tuple(
            run.repeats if yes and run.repeats * run.period < longest else repeats(run, yes, which)
            for run, yes in zip(runs, trains, strict=True)
        )

    return Depths(
        low=short(0),
        high=short(1),
        deep=tuple(run.repeats for run in runs),
        still_bytes=tuple(sum(block_bytes[run.start : run.start + run.period]) for run in runs),
    )


def training_course(
    model: nn.Module,
    tuning: Tuning,
    rows: int,
    length: int,
    *,
    backend: Backend,
    checkpoint: bool = False,
    linear_loss: bool = False,
) -> Course:
    """Trace mlx-lm's training step.

    Args:
        model: The model with its adapters.
        tuning: Names the optimizer.
        rows: Rows of the batch.
        length: Tokens of each, as `max_seq_length` counts them.
        backend: The backend that it is priced for.
        checkpoint: True where every block is checkpointed.
        linear_loss: True where the loss is taken from hidden states, False for mlx-lm's own, which holds all logits.
    """
    import mlx.core as mx
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.checkpointing.blocks import checkpoint_blocks
    from mlx_tune.graphs.arguments import ArraySpec
    from mlx_tune.lm.steps import training_step

    args, optimizer = TrainingArgs(max_seq_length=length), make_optimizer(tuning.optimizer)
    with (
        checkpoint_blocks(model) if checkpoint else nullcontext(),
        training_step(
            model,
            optimizer,
            StandInRows(1, 1, 1),
            args,
            plain_loss=not linear_loss,
            evaluate=False,
        ) as ready,
    ):
        batch = (ArraySpec((rows, length), mx.int32), ArraySpec((rows, 2), mx.int32))
        return course_of(ready.step, (batch,), ready.state, backend, state_first=True)
