"""`plan_checkpoints`: which blocks to checkpoint so that a step fits its budget and runs fastest."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any, SupportsIndex

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_tune import graphs
from mlx_tune.checkpointing.blocks import Select, find_blocks
from mlx_tune.checkpointing.choose import (
    ESTIMATE_MARGIN,
    OVERSHOOT,
    Choice,
    calibrated,
    cheapest_fitting,
    relaxed,
)
from mlx_tune.checkpointing.costs import Calls, forward_seconds, kind_of, recorded
from mlx_tune.checkpointing.measure import Measured, Measurements
from mlx_tune.checkpointing.planned import CheckpointPlan, MeasuredChoice, PlannedBlock, apply_choice
from mlx_tune.checkpointing.schedule import frontier
from mlx_tune.checkpointing.wrap import is_checkpointed
from mlx_tune.errors import BudgetError, CheckpointError, InvalidArgumentError
from mlx_tune.memory import MemoryBudget, resolve_budget
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.timing import arrays_of
from mlx_tune.units import format_bytes

#: How far below the budget the floors of the measured choices lie. Nearer, a limit has to throttle hard; further
#: away, more is computed twice than necessary. What is best differs by machine, so each is tried.
SLACKS = (ESTIMATE_MARGIN, 0.1, OVERSHOOT)


def plan_checkpoints(
    model: nn.Module,
    step: Callable[[Any], Any],
    make_batch: Callable[[int], Any],
    *,
    batch_size: int,
    budget: str | SupportsIndex | float | None = None,
    state: Any = (),
    select: Select | None = None,
    steps: int = 2,
    progress: bool = True,
) -> CheckpointPlan:
    """Choose the blocks to checkpoint so that a training step fits a memory budget and runs as fast as it can.

    What a block saves is read from the step's graph with `estimate_memory`, where nothing is computed; what it costs
    is one more forward pass, timed once for each kind of block. A dynamic programme turns both into the choices
    worth making, whole-step estimates tell which of them fit, and the best few are run for real under the highest
    memory limit that keeps their peak within the budget. If the step fits as it is and is fastest so, the plan
    is to checkpoint nothing.

    The model, the optimizer and the random streams are afterwards as before; nothing is checkpointed until
    `plan.apply()`. Apply the plan before the step runs compiled for the first time, or compile it with the model's
    state among its `inputs`.

    Args:
        model: The model, in training mode, with no block checkpointed.
        step: `step(batch)` runs one training step and returns arrays, the loss first.
        make_batch: `make_batch(n)` returns the longest batch of n.
        batch_size: The batch to plan for.
        budget: What the peak may be: bytes, text such as "24GB", a share of this machine's budget, or None for
            `memory_budget()`.
        state: What the step changes besides the model: the optimizer.
        select: Which blocks may be checkpointed, as for `checkpoint_blocks`.
        steps: How many real steps are timed for each choice and limit; the fastest counts.
        progress: Show a progress line on standard error.

    Returns:
        The plan, with predicted and measured figures. `plan.apply()` carries it out.

    Raises:
        BudgetError: The step does not fit with every block checkpointed. The text has the floor, and the largest
            smaller batch that would fit, found without running anything.
        CheckpointError: A block is checkpointed already, the model is in evaluation mode, or a block cannot be timed.
        TraceError: The step cannot be traced; the text says why.
        InvalidArgumentError: `batch_size` or `steps` below 1, or a budget that is none.

    Example:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> import mlx_tune as mt
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
        >>> optimizer = optim.SGD(0.1)
        >>> def step(x):
        ...     loss, grads = nn.value_and_grad(model, lambda model, x: model(x).square().mean())(model, x)
        ...     optimizer.update(model, grads)
        ...     return loss
        >>> plan = mt.plan_checkpoints(model, step, lambda n: mx.ones((n, 64)), batch_size=8, budget="1GB",
        ...                            state=optimizer, progress=False)
        >>> plan.measured_peak_bytes <= plan.budget_bytes
        True
    """
    for name, value in (("batch_size", batch_size), ("steps", steps)):
        if value < 1:
            raise InvalidArgumentError(f"{name}={value!r}: give a whole number of at least 1.")
    allowed = resolve_budget(budget)
    # A block that is in two places is one block.
    found = {
        id(block): (path, block) for stack in reversed(find_blocks(model, select)) for path, block in reversed(stack)
    }
    blocks = dict(reversed(found.values()))
    _require_plain(model, blocks)
    with Snapshot((model, state), spill=True), progress_bar("plan checkpoints", enabled=progress) as bar:
        return _Planner(model, step, make_batch, batch_size, allowed, (model, state), blocks, steps, bar).plan()


def _require_plain(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    already = [path for path, module in model.named_modules() if is_checkpointed(module)]
    if already:
        raise CheckpointError(
            f"{len(already)} modules are checkpointed already, the first is {already[0]!r}: a plan starts from none. "
            "Call mlx_tune.uncheckpoint(model) first."
        )
    resting = [path for path, block in blocks.items() if not block.training]
    if resting:
        raise CheckpointError(
            f"{resting[0]!r} is in evaluation mode, where checkpointing does nothing. Call model.train() first."
        )


class _Planner:
    """One plan in the making: what was estimated, timed and measured so far."""

    def __init__(
        self,
        model: nn.Module,
        step: Callable[[Any], Any],
        make_batch: Callable[[int], Any],
        batch_size: int,
        budget: MemoryBudget,
        state: Any,
        blocks: dict[str, nn.Module],
        steps: int,
        bar: Bar,
    ) -> None:
        self.model, self.step, self.make_batch, self.batch_size = model, step, make_batch, batch_size
        self.budget, self.state, self.blocks, self.steps, self.bar = budget, state, blocks, steps, bar
        self.paths = tuple(blocks)
        self.none: Choice = (False,) * len(blocks)
        self.all: Choice = (True,) * len(blocks)
        self.batch: Any = None
        self.floors: dict[Choice, int] = {}
        self.extra: list[float] = []
        # What is held beside the step counts towards its peak, and the estimate does not know of it.
        gc.collect()
        known = {id(a): a.nbytes for a in arrays_of(state)}
        self.beside = max(0, mx.get_active_memory() - sum(known.values()))

    def plan(self) -> CheckpointPlan:
        """Estimate, time, choose, measure."""
        initialize_optimizers(self.state, self.model)
        self.batch = self.make_batch(self.batch_size)
        if self.floor(self.all) > self.budget:
            raise self.does_not_fit()
        self.bar.update(text="estimating")
        with recorded(self.blocks) as calls:
            self.floor(self.none)
        self.require_calls(calls)
        self.paths = tuple(sorted(self.paths, key=lambda path: calls[path].first))
        kinds = self.kinds(calls)
        saved = self.saved_bytes(kinds)
        mx.eval(list(arrays_of(self.batch)), list(arrays_of(self.state)))
        seconds = {kind: self.kind_seconds(kinds, kind, calls) for kind in sorted(set(kinds))}
        self.extra = [seconds[kind] for kind in kinds]
        chain = calibrated([saved[kind] for kind in kinds], self.extra, self.floor(self.none), self.floor(self.all))
        choices = [s.checkpointed for s in frontier(chain, max(1, self.floor(self.none) // 500))]
        if self.floor(choices[-1]) > self.floor(self.all):
            choices.append(self.all)
        self.real = Measurements(
            self.model, self.paths, self.step, self.batch, self.state, int(self.budget), self.steps, self.bar
        )
        best = self.search(choices, kinds)
        return self.result(best, kinds, saved)

    def floor(self, choice: Choice, batch: Any = None) -> int:
        """The estimated floor of the step's memory under a choice, everything held in the process included."""
        if batch is None and choice in self.floors:
            return self.floors[choice]
        undo = apply_choice(self.model, self.chosen(choice))
        try:
            estimate = graphs.estimate_memory(self.step, self.batch if batch is None else batch, state=self.state)
        finally:
            undo()
        floor = estimate.floor_bytes + self.beside
        if batch is None:
            self.floors[choice] = floor
        return floor

    def chosen(self, choice: Choice) -> tuple[str, ...]:
        """The paths of the checkpointed blocks."""
        return tuple(path for path, yes in zip(self.paths, choice, strict=True) if yes)

    def does_not_fit(self) -> BudgetError:
        """Find the largest smaller batch that would fit, and say so."""
        floor, low, high = self.floor(self.all), 0, self.batch_size
        while high - low > 1:
            middle = (low + high) // 2
            self.bar.update(text=f"batch {middle}?")
            fits = self.floor(self.all, self.make_batch(middle)) * (1 + ESTIMATE_MARGIN) <= self.budget
            low, high = (middle, high) if fits else (low, middle)
        way_out = (
            f"Batch size {low} would fit that way: gather gradients over several of them."
            if low
            else "Not even batch size 1 would: shorten the inputs, train fewer parameters, or quantize the base."
        )
        return BudgetError(
            f"A step at batch size {self.batch_size} does not fit {format_bytes(self.budget)}: with all "
            f"{len(self.blocks)} blocks checkpointed it still needs at least {format_bytes(floor)} "
            f"(predicted from its graph, nothing was run). {way_out}",
            needed_bytes=floor,
            budget_bytes=int(self.budget),
        )

    def require_calls(self, calls: dict[str, Calls]) -> None:
        """Refuse a step that does not run the blocks."""
        idle = [path for path, noted in calls.items() if not noted.inputs]
        if idle:
            raise CheckpointError(
                f"The step does not call {idle[0]!r} ({len(idle)} of {len(calls)} blocks are not called): "
                "it must run this model, and a compiled step must not have been traced as another one. "
                "Leave blocks that are not used out with select=."
            )

    def kinds(self, calls: dict[str, Calls]) -> list[int]:
        """Number the kinds of blocks, in the order they run."""
        numbers: dict[Any, int] = {}
        return [numbers.setdefault(kind_of(self.blocks[p], calls[p]), len(numbers)) for p in self.paths]

    def saved_bytes(self, kinds: list[int]) -> dict[int, int]:
        """What checkpointing one block of each kind saves, from graphs in which only that block differs.

        Next to no other checkpointed block and next to all others: where another part of the step is nearly as high,
        one of the two hides behind it.
        """
        saved = {}
        for kind in sorted(set(kinds)):
            i = kinds.index(kind)
            self.bar.update(text=f"estimating {self.paths[i]}")
            alone = tuple(k == i for k in range(len(kinds)))
            missing = tuple(k != i for k in range(len(kinds)))
            saved[kind] = max(0, self.floor(self.none) - self.floor(alone), self.floor(missing) - self.floor(self.all))
        return saved

    def kind_seconds(self, kinds: list[int], kind: int, calls: dict[str, Calls]) -> float:
        """The forward passes of one block of a kind."""
        path = self.paths[kinds.index(kind)]
        self.bar.update(text=f"timing {path}")
        return forward_seconds(path, self.blocks[path], calls[path])

    def search(self, choices: list[Choice], kinds: list[int]) -> Measured:
        """Measure the choices whose floors leave little, some and plenty of slack; the fastest that fits."""
        wanted: list[Choice] = []
        for slack in SLACKS:
            limit = int(self.budget / (1 + slack))
            index = cheapest_fitting(choices, self.floor, limit)
            choice = choices[-1] if index is None else relaxed(choices[index], kinds, self.extra, self.floor, limit)
            if choice not in wanted:
                wanted.append(choice)
        # The leanest first: it is the surest to fit.
        fitting = [m for choice in reversed(wanted) if (m := self.real.fit(choice, self.floor(choice))).fits]
        if not fitting:
            fitting = [m for choice in (choices[-1], self.all) if (m := self.real.fit(choice, self.floor(choice))).fits]
        if not fitting:
            raise self.no_limit_holds()
        # The one that computes least twice is the favourite: another has to be clearly faster, so that noise
        # does not choose.
        favourite, *others = sorted(fitting, key=lambda m: self.extra_seconds(m.choice))
        for other in others:
            favourite = self.real.faster(favourite, other)
        return favourite

    def predicted_seconds(self, best: Measured) -> float | None:
        """From the time of the leanest other choice that was run, and what the two choices compute twice."""
        others = [m for m in self.real.made.values() if m is not best]
        if not others:
            return None
        known = max(others, key=lambda m: self.extra_seconds(m.choice))
        return max(0.0, known.seconds - self.extra_seconds(known.choice) + self.extra_seconds(best.choice))

    def extra_seconds(self, choice: Choice) -> float:
        """What a choice computes twice."""
        return sum(s for s, yes in zip(self.extra, choice, strict=True) if yes)

    def no_limit_holds(self) -> BudgetError:
        """The estimate said that it fits, and the measurement that it does not."""
        least = min(self.real.made.values(), key=lambda m: m.peak_bytes)
        return BudgetError(
            f"A step at batch size {self.batch_size} does not fit {format_bytes(self.budget)}: with "
            f"{sum(least.choice)} of {len(self.blocks)} blocks checkpointed it was predicted to need at least "
            f"{format_bytes(self.floor(least.choice))}, and its peak was {format_bytes(least.peak_bytes)} under a "
            f"limit of {format_bytes(least.limit_bytes)}. Take a smaller batch, or a budget a few per cent larger.",
            needed_bytes=least.peak_bytes,
            budget_bytes=int(self.budget),
        )

    def result(self, best: Measured, kinds: list[int], saved: dict[int, int]) -> CheckpointPlan:
        """Put it all together."""
        notes = []
        if math.isclose(self.floor(self.none), self.floor(self.all), rel_tol=0.01):
            notes.append("Checkpointing saves this step nothing: its peak lies outside the blocks.")
        return CheckpointPlan(
            blocks=tuple(
                PlannedBlock(path, yes, saved[kind], seconds, kind)
                for path, yes, seconds, kind in zip(self.paths, best.choice, self.extra, kinds, strict=True)
            ),
            batch_size=self.batch_size,
            predicted_peak_bytes=self.floor(best.choice),
            measured_peak_bytes=best.peak_bytes,
            predicted_seconds=self.predicted_seconds(best),
            measured_seconds=best.seconds,
            limit_bytes=best.limit_bytes,
            budget_bytes=int(self.budget),
            choices=tuple(
                MeasuredChoice(sum(m.choice), self.floor(m.choice), m.limit_bytes, m.peak_bytes, m.seconds, m.fits)
                for m in self.real.made.values()
            ),
            notes=tuple(notes),
            _model=self.model,
        )


def initialize_optimizers(state: Any, model: nn.Module) -> None:
    """Give optimizers that have not run yet the state that they hold from the second step on; nothing is evaluated.

    Args:
        state: Where to look for optimizers.
        model: Whose trainable parameters they update. Of several new optimizers it cannot be told which updates
            what: then they are left as they are.
    """
    waiting, new = [state], []
    while waiting:
        node = waiting.pop()
        if isinstance(node, Optimizer):
            if not node._initialized:
                new.append(node)
        elif isinstance(node, dict) and not isinstance(node, nn.Module):
            waiting.extend(node.values())
        elif isinstance(node, (list, tuple)):
            waiting.extend(node)
    if len(new) == 1:
        new[0].init(model.trainable_parameters())
