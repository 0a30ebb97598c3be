"""The knowledge of a step before it runs: its blocks, what they save and cost, and its floor under any choice."""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_tune.checkpointing.block.wrap import is_checkpointed
from mlx_tune.checkpointing.blocks import Select, find_blocks
from mlx_tune.checkpointing.planning.choose import Choice, calibrated
from mlx_tune.checkpointing.planning.costs import Calls, block_kind, forward_seconds, recorded
from mlx_tune.checkpointing.planning.schedule import frontier
from mlx_tune.checkpointing.planning.ways import Ways
from mlx_tune.errors import BudgetError, CheckpointError
from mlx_tune.graphs.estimate import estimate_memory
from mlx_tune.graphs.tracing.trace import taking
from mlx_tune.interrupts import interruptible
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN, largest_fitting
from mlx_tune.measuring.throttle import OVERSHOOT
from mlx_tune.progress import Bar
from mlx_tune.trees import arrays_of, nbytes_of, outermost
from mlx_tune.units import format_bytes

#: The linear loss is taken for good where a step with it takes no more than this share longer: it holds less.
EQUAL = 0.01

#: Times two choices in turns.
Weigh = Callable[[int, Choice, Choice, float], tuple[float, float]]


class Survey:
    """The blocks of a model as one step uses them, and the loss where there are two.

    Attributes:
        ways: The ways to run the step: as a function of one batch once a batch has been made, with blocks in the order
            they run once `study` has seen them run, and with one loss where `study` has found it no worse.
        kinds: For each truth of a choice, the number of its kind: of the block, or of the loss.
        saved_bytes: For each kind, what one of it saves at `batch_size`.
        extra_seconds: For each truth of a choice, what it costs at `batch_size`.
        choices: The choices worth making, from the fastest to the leanest.
        batch_size: The batch that the figures belong to.
        beside_bytes: The memory that is held beside the step; part of every floor.
        notes: Remarks on the loss, where there were two.
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
        linear_step: Callable[..., object] | None = None,
    ) -> None:
        """Find the blocks and refuse those that cannot be planned for; nothing is run or traced.

        Every figure that may differ between machines is made through `share`, which hands all of them the same one.
        Without `blocks` none is looked for: the step is surveyed as it is.
        """
        self.model, self.make_batch, self.state, self.bar = model, make_batch, state, bar
        self._share = share
        # A block that is in two places is one block.
        stacks = find_blocks(model, select) if blocks else ()
        found = {id(block): (path, block) for stack in reversed(stacks) for path, block in reversed(stack)}
        self.blocks: dict[str, nn.Module] = dict(reversed(found.values()))
        if blocks:
            self._require_plain()
        self.ways = Ways(model, tuple(self.blocks), step, linear_step)
        self.notes: list[str] = []
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

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the blocks are."""
        return self.ways.paths

    @property
    def none(self) -> Choice:
        """No block checkpointed, and the plain loss."""
        return self.ways.none

    @property
    def all(self) -> Choice:
        """Every block checkpointed, and the linear loss."""
        return self.ways.all

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
        batch = self._batch(size)
        with self.ways.applied(choice) as step:
            estimate = estimate_memory(step, batch, state=self.state)
        return int(estimate.floor_bytes + self.beside_bytes)

    def _batch(self, size: int) -> object:
        if size not in self._batches:
            self._batches.clear()  # estimates for one size follow each other
            with interruptible():
                self._batches[size] = self.make_batch(size)
            batch, ways = (self._batches[size],), self.ways
            linear = None if ways.linear_step is None else taking(ways.linear_step, batch, self.state)
            self.ways = replace(ways, step=taking(ways.step, batch, self.state), linear_step=linear)
        return self._batches[size]

    def release(self) -> None:
        """Let go of the batch that was estimated last, so that it does not count towards a measured peak."""
        self._batches.clear()

    def extra(self, choice: Choice) -> float:
        """Seconds that a choice computes twice, at the survey's batch size."""
        return sum(s for s, yes in zip(self.extra_seconds, choice, strict=True) if yes)

    def study(self, weigh: Weigh | None = None, budget_bytes: int = 0, sizes: Sequence[int] = ()) -> None:
        """See the blocks run in a trace, read from graphs what they save, and time their forward passes.

        Args:
            weigh: Times two choices in turns where there are two losses: called with a batch size, the choices, and
                the ratio of times in question, it returns that ratio and the seconds of the first.
            budget_bytes: The limit of a step's peak, for that.
            sizes: Batch sizes that may be run, for that.
        """
        self.bar.update(text="estimating")
        with recorded(self.blocks) as calls:
            self.floor(self.none)
        self._require_calls(calls)
        paths = tuple(sorted(self.paths, key=lambda path: calls[path].first))
        self.ways = replace(self.ways, paths=paths)
        mx.eval(list(arrays_of(self.state)))
        of_loss = self._loss_seconds(weigh, budget_bytes, sizes) if self.ways.two else []
        of_blocks = self._number_kinds(calls)
        self.kinds = of_blocks + [len(set(of_blocks))] * self.ways.two
        for kind in sorted(set(self.kinds)):
            self.saved_bytes[kind] = self._saved_bytes(self.kinds.index(kind))
        seconds = {}
        for kind in sorted(set(of_blocks)):
            path = self.paths[of_blocks.index(kind)]
            self.bar.update(text=f"timing {path}")
            seconds[kind] = self._share(partial(forward_seconds, path, self.blocks[path], calls[path]))
        self.extra_seconds = [seconds[kind] for kind in of_blocks] + of_loss
        self.release()
        self._rank()

    def _loss_seconds(self, weigh: Weigh | None, budget_bytes: int, sizes: Sequence[int]) -> list[float]:
        """The seconds that the linear loss costs; none where it is settled on, as no slower or as the one that fits."""
        assert weigh is not None
        ways, goal = self.ways, int(budget_bytes / (1 + OVERSHOOT))
        size, choice = self.batch_size, ways.none
        if self.floor(choice) > goal:
            choice = ways.with_loss(ways.all, linear=False)
            smaller = sizes[: bisect_right(sizes, self.batch_size)]
            self.bar.update(text="largest batch with the plain loss")
            found = largest_fitting(smaller, lambda n: self.floor(choice, n), goal)
            if found is None:
                self._settle("with the plain one no step fits the budget with room to spare")
                return []
            size = found
        self.release()
        ratio, seconds = weigh(size, choice, ways.with_loss(choice, linear=True), 1 + EQUAL)
        timed = f"timed in turns at batch size {size}, a step took {ratio:.2f} times as long as with the plain one"
        if ratio <= 1 + EQUAL:
            self._settle(timed)
            return []
        self.notes.append(f"The linear loss, which never holds all logits, is a choice that costs time: {timed}.")
        return [(ratio - 1) * seconds * self.batch_size / size]

    def _settle(self, reason: str) -> None:
        """Leave the linear loss as the only one."""
        self.notes.append(f"The linear loss, which never holds all logits, was taken: {reason}.")
        self._floors = {(choice[:-1], size): floor for (choice, size), floor in self._floors.items() if choice[-1]}
        assert self.ways.linear_step is not None
        self.ways = replace(self.ways, step=self.ways.linear_step, linear_step=None, settled="linear")

    def _rank(self) -> None:
        if self.none == self.all:
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
        """The bytes that checkpointing block `i`, or the loss, saves, from graphs in which only that differs.

        Next to no other checkpointed block and next to all others: where another part of the step is nearly as high,
        one of the two hides behind it.
        """
        self.bar.update(text=f"estimating {(*self.paths, 'the linear loss')[i]}")
        alone = tuple(k == i for k in range(len(self.none)))
        missing = tuple(k != i for k in range(len(self.none)))
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
