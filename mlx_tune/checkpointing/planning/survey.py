"""The knowledge of a step before it runs: its blocks, what they save and cost, and its floor under any choice."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_tune.checkpointing.block.wrap import is_checkpointed
from mlx_tune.checkpointing.blocks import Select, find_blocks
from mlx_tune.checkpointing.planning.checkpoint_plan import apply_choice
from mlx_tune.checkpointing.planning.choose import Choice, calibrated, chosen_paths
from mlx_tune.checkpointing.planning.costs import Calls, block_kind, forward_seconds, recorded
from mlx_tune.checkpointing.planning.schedule import frontier
from mlx_tune.errors import BudgetError, CheckpointError
from mlx_tune.graphs.estimate import estimate_memory
from mlx_tune.graphs.tracing.trace import taking
from mlx_tune.interrupts import interruptible
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN, largest_fitting
from mlx_tune.progress import Bar
from mlx_tune.trees import arrays_of, nbytes_of, outermost
from mlx_tune.units import format_bytes


class Survey:
    """The blocks of a model as one step uses them.

    Attributes:
        step: The step as a function of one batch, once a batch has been made.
        paths: Where the blocks are, in the order they run once `study` has seen them run.
        kinds: For each block, the number of its kind.
        saved_bytes: For each kind, what checkpointing one block of it saves at `batch_size`.
        extra_seconds: For each block, what checkpointing it costs at `batch_size`.
        choices: The choices worth making, from the fastest to the leanest.
        batch_size: The batch that the figures belong to.
        beside_bytes: The memory that is held beside the step; part of every floor.
    """

    def __init__(
        self,
        model: nn.Module,
        step: Callable[..., object],
        make_batch: Callable[[int], object],
        batch_size: int,
        state: object,
        select: Select | None,
        bar: Bar,
        share: Callable[[Callable[[], float]], float] = lambda figure: figure(),
        blocks: bool = True,
    ) -> None:
        """Find the blocks and refuse those that cannot be planned for; nothing is run or traced.

        Every figure that may differ between machines is made through `share`, which hands all of them the same one.
        Without `blocks` none is looked for: the step is surveyed as it is.
        """
        self.model, self.step, self.make_batch, self.state, self.bar = model, step, make_batch, state, bar
        self._share = share
        # A block that is in two places is one block.
        stacks = find_blocks(model, select) if blocks else ()
        found = {id(block): (path, block) for stack in reversed(stacks) for path, block in reversed(stack)}
        self.blocks: dict[str, nn.Module] = dict(reversed(found.values()))
        if blocks:
            self._require_plain()
        self.paths = tuple(self.blocks)
        self.none: Choice = (False,) * len(self.paths)
        self.all: Choice = (True,) * len(self.paths)
        self.batch_size = batch_size
        self.kinds: list[int] = []
        self.saved_bytes: dict[int, int] = {}
        self.extra_seconds: list[float] = []
        self.choices: list[Choice] = []
        self._floors: dict[tuple[Choice, int], int] = {}
        self._batches: dict[int, object] = {}
        # What is held beside the step counts towards its peak, and the estimate does not know of it.
        gc.collect()
        self.beside_bytes = max(0, mx.get_active_memory() - nbytes_of(state))
        initialize_optimizers(state, model)

    def floor(self, choice: Choice, batch_size: int | None = None) -> int:
        """The estimated floor of the step's memory, everything held in the process included.

        Args:
            choice: Which blocks are checkpointed.
            batch_size: For which batch; the survey's own where None.
        """
        size = self.batch_size if batch_size is None else batch_size
        if (choice, size) not in self._floors:
            self._floors[choice, size] = int(self._share(lambda: self._estimated(choice, size)))
        return self._floors[choice, size]

    def _estimated(self, choice: Choice, size: int) -> int:
        undo = apply_choice(self.model, chosen_paths(self.paths, choice))
        try:
            estimate = estimate_memory(self.step, self._batch(size), state=self.state)
        finally:
            undo()
        return int(estimate.floor_bytes + self.beside_bytes)

    def _batch(self, size: int) -> object:
        if size not in self._batches:
            self._batches.clear()  # estimates for one size follow each other
            with interruptible():
                self._batches[size] = self.make_batch(size)
            self.step = taking(self.step, (self._batches[size],), self.state)
        return self._batches[size]

    def release(self) -> None:
        """Let go of the batch that was estimated last, so that it does not count towards a measured peak."""
        self._batches.clear()

    def extra(self, choice: Choice) -> float:
        """Seconds that a choice computes twice, at the survey's batch size."""
        return sum(s for s, yes in zip(self.extra_seconds, choice, strict=True) if yes)

    def study(self) -> None:
        """See the blocks run in a trace, read from graphs what they save, and time their forward passes."""
        self.bar.update(text="estimating")
        with recorded(self.blocks) as calls:
            self.floor(self.none)
        self._require_calls(calls)
        self.paths = tuple(sorted(self.paths, key=lambda path: calls[path].first))
        self.kinds = self._number_kinds(calls)
        for kind in sorted(set(self.kinds)):
            self.saved_bytes[kind] = self._saved_bytes(self.kinds.index(kind))
        mx.eval(list(arrays_of(self.state)))
        seconds = {}
        for kind in sorted(set(self.kinds)):
            path = self.paths[self.kinds.index(kind)]
            self.bar.update(text=f"timing {path}")
            seconds[kind] = self._share(partial(forward_seconds, path, self.blocks[path], calls[path]))
        self.extra_seconds = [seconds[kind] for kind in self.kinds]
        self.release()
        self._rank()

    def _rank(self) -> None:
        if not self.paths:
            self.choices = [self.none]
            return
        plain, leanest = self.floor(self.none), self.floor(self.all)
        chain = calibrated([self.saved_bytes[kind] for kind in self.kinds], self.extra_seconds, plain, leanest)
        self.choices = [s.checkpointed for s in frontier(chain, max(1, plain // 500))]
        if self.floor(self.choices[-1]) > leanest:
            self.choices.append(self.all)

    def _require_plain(self) -> None:
        already = [path for path, module in self.model.named_modules() if is_checkpointed(module)]
        if already:
            raise CheckpointError(
                f"{len(already)} modules are checkpointed already, the first is {already[0]!r}: a plan starts from "
                "none. Call mlx_tune.uncheckpoint(model) first."
            )
        resting = [path for path, block in self.blocks.items() if not block.training]
        if resting:
            raise CheckpointError(
                f"{resting[0]!r} is in evaluation mode, where checkpointing does nothing. Call model.train() first."
            )

    def _require_calls(self, calls: dict[str, Calls]) -> None:
        idle = [path for path, noted in calls.items() if not noted.inputs]
        if idle:
            raise CheckpointError(
                f"The step does not call {idle[0]!r} ({len(idle)} of {len(calls)} blocks are not called): it must run "
                "this model, and a compiled step must not have been traced as another one. "
                "Leave blocks that are not used out with select=."
            )

    def _number_kinds(self, calls: dict[str, Calls]) -> list[int]:
        numbers: dict[object, int] = {}
        return [numbers.setdefault(block_kind(self.blocks[p], calls[p]), len(numbers)) for p in self.paths]

    def _saved_bytes(self, i: int) -> int:
        """The bytes that checkpointing block `i` saves, from graphs in which only that block differs.

        Next to no other checkpointed block and next to all others: where another part of the step is nearly as high,
        one of the two hides behind it.
        """
        self.bar.update(text=f"estimating {self.paths[i]}")
        alone = tuple(k == i for k in range(len(self.paths)))
        missing = tuple(k != i for k in range(len(self.paths)))
        return max(0, self.floor(self.none) - self.floor(alone), self.floor(missing) - self.floor(self.all))


def initialize_optimizers(state: object, model: nn.Module) -> None:
    """Give optimizers that have not run yet the state that they hold from the second step on; nothing is evaluated.

    Args:
        state: Where to look for optimizers.
        model: Whose trainable parameters they update. Of several new optimizers it cannot be told which updates
            what: then they are left as they are.
    """
    new = [optimizer for optimizer in outermost(state, Optimizer) if not optimizer._initialized]
    if len(new) == 1:
        new[0].init(model.trainable_parameters())


def does_not_fit(survey: Survey, budget_bytes: int) -> BudgetError:
    """The error that says what the step needs with every block checkpointed, and which smaller batch would fit.

    Args:
        survey: The step, at the batch size that does not fit.
        budget_bytes: The limit of its peak.

    Returns:
        The error. The batch is found without a run.
    """

    def floor_at(size: int) -> int:
        survey.bar.update(text=f"batch {size}?")
        return survey.floor(survey.all, size)

    floor, smaller = survey.floor(survey.all), range(1, survey.batch_size)
    fitting = largest_fitting(smaller, floor_at, int(budget_bytes / (1 + ESTIMATE_MARGIN))) if smaller else None
    way_out = (
        f"Batch size {fitting} would fit that way: gather gradients over several of them."
        if fitting is not None
        else "Not even batch size 1 would: shorten the inputs, train fewer parameters, or quantize the base."
    )
    count = len(survey.paths)
    needs = f"with all {count} blocks checkpointed it still needs" if count else "it needs"
    return BudgetError(
        f"A step at batch size {survey.batch_size} does not fit {format_bytes(budget_bytes)}: {needs} at least "
        f"{format_bytes(floor)} (predicted from its graph, nothing was run). {way_out}",
        needed_bytes=floor,
        budget_bytes=budget_bytes,
    )
