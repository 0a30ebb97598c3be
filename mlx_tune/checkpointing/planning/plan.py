"""`plan_checkpoints`: which blocks to checkpoint so that a step fits its budget and runs fastest."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.nn as nn

from mlx_tune.checkpointing.blocks import Select, find_blocks
from mlx_tune.checkpointing.planning.checkpoint_plan import CheckpointPlan, MeasuredChoice, PlannedBlock
from mlx_tune.checkpointing.planning.choose import Choice, relaxed
from mlx_tune.checkpointing.planning.measure import ChoiceMeasurement, Measurements, made
from mlx_tune.checkpointing.planning.survey import Survey, does_not_fit
from mlx_tune.errors import BudgetError
from mlx_tune.garbage import quick_collections
from mlx_tune.graphs.step_calls import require_functions
from mlx_tune.interrupts import uninterrupted
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN, cheapest_fitting
from mlx_tune.measuring.half_precision import slow_half_precision
from mlx_tune.measuring.throttle import OVERSHOOT
from mlx_tune.memory import cache_room, resolve_budget
from mlx_tune.progress import progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.units import Budget, format_bytes, whole_number

#: How far below the budget the floors of the measured choices lie. Nearer, a limit has to throttle hard; further
#: away, more is computed twice than necessary. What is best differs by machine, so each is tried.
SLACKS = (ESTIMATE_MARGIN, 0.1, OVERSHOOT)


def plan_checkpoints(
    model: nn.Module,
    step: Callable[..., object],
    make_batch: Callable[[int], object],
    *,
    batch_size: int,
    budget: Budget = None,
    state: object = (),
    select: Select | None = None,
    steps: int = 2,
    linear_step: Callable[..., object] | None = None,
    progress: bool = True,
) -> CheckpointPlan:
    """Choose the blocks to checkpoint so that a training step fits a memory budget and runs as fast as it can.

    The savings of a block are read from the step's graph with `estimate_memory`, where nothing is computed; what it
    costs is one more forward pass, timed once for each kind of block. A dynamic programme turns both into the choices
    worth making, whole-step estimates tell which of them fit, and the best few are run for real under the highest
    memory limit that keeps their peak within the budget. If the step fits as it is and is fastest so, the plan
    is to checkpoint nothing.

    The model, the optimizer and the random streams are afterwards as before; nothing is checkpointed until
    `plan.apply()`. Apply the plan before the step runs compiled for the first time, or compile it with the model's
    state among its `inputs`.

    Args:
        model: The model, in training mode, with no block checkpointed.
        step: `step(batch)`, `step(x, y)` or `step(**batch)`, as its signature asks for, runs one training step and
            returns arrays, the loss first.
        make_batch: `make_batch(n)` returns the longest batch of n: an array, a tuple or a dictionary.
        batch_size: The batch to plan for.
        budget: The limit of the peak: bytes, text such as "24GB", a share of this machine's budget, or None for
            `memory_budget()`.
        state: Objects that the step changes besides the model: the optimizer.
        select: Which blocks may be checkpointed, as for `checkpoint_blocks`.
        steps: The number of real steps that are timed for each choice and limit; the fastest counts.
        linear_step: The same step with `linear_cross_entropy` in the place of a loss that holds all logits. It is one
            more choice, as if the loss were a block: both are timed in turns, and the plan says which it takes.
        progress: Show a progress line on standard error.

    Returns:
        The plan, with predicted and measured figures. `plan.apply()` carries it out.

    Raises:
        BudgetError: The step does not fit with every block checkpointed. The text has the floor, and the largest
            smaller batch that would fit, found without running anything.
        CheckpointError: A block is checkpointed already, the model is in evaluation mode, or a block cannot be timed.
        TraceError: The step cannot be traced; the text says why.
        InvalidArgumentError: `batch_size` or `steps` below 1, a budget that is none, a `model` that is no module, a
            `step` or `make_batch` that is no function, or a batch that the step does not take.
        DiskError: Too little free disk for what waits there meanwhile.

    Examples:
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
        >>> plan.peak_bytes <= plan.budget_bytes
        True
    """
    require_functions(step, make_batch, linear_step)
    batch_size, steps = whole_number(batch_size, "batch_size", least=1), whole_number(steps, "steps", least=1)
    allowed = resolve_budget(budget)
    find_blocks(model, select)  # what cannot be planned for is refused before anything is collected or put aside
    whole = (model, state)
    with (
        uninterrupted(),
        quick_collections(),
        Snapshot(whole, spill=True),
        progress_bar("plan checkpoints", enabled=progress) as bar,
    ):
        notes = slow_half_precision(whole, bar)
        survey = Survey(model, step, make_batch, batch_size, whole, select, bar, linear_step=linear_step)
        if survey.floor(survey.all) > allowed:
            raise does_not_fit(survey, int(allowed))

        def measurements(size: int) -> Measurements:
            return Measurements(survey.ways, made(make_batch, size), whole, int(allowed), steps, bar)

        survey.study(lambda size, *choices: measurements(size).weigh(*choices), int(allowed), range(1, batch_size + 1))
        real = measurements(batch_size)
        best = _fastest(survey, real, int(allowed))
        return _result(survey, real, best, int(allowed), [*notes, *survey.notes])


def candidates(survey: Survey, budget_bytes: int, batch_size: int | None = None) -> list[Choice]:
    """The choices whose floors leave little, some and plenty of the budget; the one that computes most twice first.

    Args:
        survey: A step that was studied.
        budget_bytes: The limit of its peak.
        batch_size: For which batch; the survey's own where None.
    """

    def floor(choice: Choice) -> int:
        return survey.floor(choice, batch_size)

    found: list[Choice] = []
    for slack in SLACKS:
        limit = int(budget_bytes / (1 + slack))
        index = cheapest_fitting(survey.choices, floor, limit)
        choice = survey.choices[-1]
        if index is not None:
            choice = relaxed(survey.choices[index], survey.kinds, survey.extra_seconds, floor, limit)
        if choice not in found:
            found.append(choice)
    return found[::-1]


def _fastest(survey: Survey, real: Measurements, budget_bytes: int) -> ChoiceMeasurement:
    """Measure the candidates, the surest to fit first, and return the fastest that does."""

    def measured(choices: list[Choice]) -> list[ChoiceMeasurement]:
        return [m for choice in choices if (m := real.fit(choice, survey.floor(choice))).fits]

    fitting = measured(candidates(survey, budget_bytes)) or measured([survey.choices[-1], survey.all])
    while fitting:
        # The one that computes least twice is the favourite: another has to be clearly faster, so that noise does not
        # choose.
        favourite, *others = sorted(fitting, key=lambda m: survey.extra(m.choice))
        for other in others:
            favourite = real.faster(favourite, other)
        if real.hold(favourite).fits:
            return favourite
        fitting = [m for m in fitting if m is not favourite and m.fits]
    raise _no_limit_holds(survey, real, budget_bytes)


def _no_limit_holds(survey: Survey, real: Measurements, budget_bytes: int) -> BudgetError:
    """The estimate said that it fits, and the measurement that it does not."""
    least = min(real.made.values(), key=lambda m: m.peak_bytes)
    return BudgetError(
        f"A step at batch size {survey.batch_size} does not fit {format_bytes(budget_bytes)}: with "
        f"{survey.ways.named(least.choice)} it was predicted to need at least "
        f"{format_bytes(survey.floor(least.choice))}, and its peak was {format_bytes(least.peak_bytes)} under a "
        f"limit of {format_bytes(least.limit_bytes)}. Take a smaller batch, or a budget a few per cent larger. If "
        "the step is compiled, the model's state must be among its inputs: otherwise it goes on as first traced.",
        needed_bytes=least.peak_bytes,
        budget_bytes=budget_bytes,
    )


def _predicted_seconds(survey: Survey, real: Measurements, best: ChoiceMeasurement) -> float | None:
    """From the time of the leanest other choice that was run, and what the two choices compute twice."""
    others = [m for m in real.made.values() if m is not best]
    if not others:
        return None
    known = max(others, key=lambda m: survey.extra(m.choice))
    return max(0.0, known.seconds - survey.extra(known.choice) + survey.extra(best.choice))


def _result(
    survey: Survey, real: Measurements, best: ChoiceMeasurement, budget_bytes: int, notes: list[str]
) -> CheckpointPlan:
    if math.isclose(survey.floor(survey.none), survey.floor(survey.all), rel_tol=0.01):
        notes = [*notes, "Checkpointing saves this step nothing: its peak lies outside the blocks."]
    # The loss, where it was a choice, comes after the blocks.
    rows = zip(survey.paths, best.choice, survey.extra_seconds, survey.kinds, strict=not survey.ways.two)
    return CheckpointPlan(
        blocks=tuple(
            PlannedBlock(path, yes, survey.saved_bytes[kind], seconds, kind) for path, yes, seconds, kind in rows
        ),
        batch_size=survey.batch_size,
        predicted_peak_bytes=survey.floor(best.choice),
        peak_bytes=best.peak_bytes,
        predicted_seconds=_predicted_seconds(survey, real, best),
        measured_seconds=best.seconds,
        limit_bytes=best.limit_bytes,
        cache_limit_bytes=cache_room(budget_bytes, best.peak_bytes),
        budget_bytes=budget_bytes,
        trials=tuple(
            MeasuredChoice(
                len(survey.ways.chosen(m.choice)),
                survey.floor(m.choice),
                m.limit_bytes,
                m.peak_bytes,
                m.seconds,
                m.fits,
                survey.ways.loss(m.choice),
            )
            for m in real.made.values()
        ),
        notes=tuple(notes),
        loss=survey.ways.loss(best.choice),
        _model=survey.model,
    )
