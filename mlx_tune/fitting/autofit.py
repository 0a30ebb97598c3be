"""`autofit`: checkpoints, batch size, accumulation and memory limit chosen together, for the most tokens a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import mlx.nn as nn

from mlx_tune import devices
from mlx_tune.batching.sizes import agreed_sizes
from mlx_tune.checkpointing.blocks import Select, find_blocks
from mlx_tune.checkpointing.planning.survey import Survey
from mlx_tune.errors import CheckpointError, InvalidArgumentError
from mlx_tune.fitting.result import Fit, Setting
from mlx_tune.fitting.search import Search
from mlx_tune.fitting.trials import Candidate, Trials
from mlx_tune.garbage import quick_collections
from mlx_tune.graphs.step_calls import require_functions
from mlx_tune.interrupts import uninterrupted
from mlx_tune.measuring.half_precision import slow_half_precision
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.memory import MemoryBudget, cache_room, resolve_budget
from mlx_tune.pareto import unbeaten
from mlx_tune.progress import progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.units import Budget, whole_number


def autofit(
    model: nn.Module,
    step: Callable[..., object],
    make_batch: Callable[[int], object],
    *,
    budget: Budget = None,
    target_batch: int | None = None,
    tolerance: float = 0.01,
    state: object = (),
    min_batch: int = 1,
    max_batch: int | None = None,
    multiple_of: int = 1,
    checkpoint: bool = True,
    select: Select | None = None,
    throttle: bool | None = None,
    steps: int = 2,
    linear_step: Callable[..., object] | None = None,
    group: object = None,
    progress: bool = True,
) -> Fit:
    """Choose checkpoints, batch size, accumulation and memory limit together, for the most tokens a second.

    They hang together: checkpointing frees memory for a larger batch, which may or may not be faster. The needs of a
    batch and a choice of blocks are read from the step's graph; what a step takes is predicted from measured ones and
    the blocks' forward passes. What anybody would try without this function is run in any case, unless it is
    predicted to be hopeless: the largest batch without checkpoints, the largest with every block checkpointed, and
    mlx-lm's default of four rows. Other settings are run where they promise more. Those that come out close are timed
    in turns, and the medians decide.

    Args:
        model: The model, in training mode, with no block checkpointed.
        step: `step(batch)`, `step(x, y)` or `step(**batch)`, as its signature asks for, runs one training step and
            returns arrays, the loss first.
        make_batch: `make_batch(n)` returns the longest batch of n: an array, a tuple or a dictionary.
        budget: The limit of the peak: bytes, text such as "24GB", a share of this machine's budget, or None for
            `memory_budget()`.
        target_batch: Rows that make up one update: batch sizes divide it, and `accumulation_steps` says how many
            steps make it up. None for whatever is fastest.
        tolerance: Of the settings within this share of the best rate, the one with the lowest peak is chosen. Without
            a target, batches below mlx-lm's four rows are left to those who need them: there a smaller batch is
            chosen only if it is faster by more than this.
        state: Objects that the step changes besides the model: the optimizer.
        min_batch: The smallest batch to consider.
        max_batch: The largest batch to consider, such as the size of the data set.
        multiple_of: Batch sizes divide by this, such as the number of machines that share a batch.
        checkpoint: True where blocks may be checkpointed. False leaves the model as it is, blocks that are checkpointed
            already included, and chooses the rest. So does a model without repeated blocks.
        select: Which blocks may be checkpointed, as for `checkpoint_blocks`.
        throttle: True where the memory limit may be set below the budget, which makes MLX wait instead of running
            ahead. By default yes, except on Metal, where nobody has measured it yet; there the limit is the budget.
        steps: The number of real steps that are timed for each setting and limit; the fastest counts. Settings that
            come out close are run up to three times as often again.
        linear_step: The same step with `linear_cross_entropy` in the place of a loss that holds all logits: one more
            choice. Both are timed in turns first; where the linear loss is no slower it is the only one from then on,
            since it holds less, and else it is taken like a checkpoint, where its memory is worth its time.
        group: The `mx.distributed` group to agree with; by default that of `mlx.launch`, where it is at work. Every
            rank gets the same answer, for the smallest budget and the slowest machine.
        progress: Show a progress line on standard error.

    Returns:
        The fit. Train in `with fit.applied():` with batches of `fit.batch_size`.

    Raises:
        BudgetError: Not even the smallest batch fits with every block checkpointed.
        CheckpointError: A block is checkpointed already, the model is in evaluation mode, or a block cannot be timed.
        TraceError: The step cannot be traced; the text says why.
        InvalidArgumentError: Arguments that contradict one another, or a batch that the step does not take.
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
        >>> fit = mt.autofit(model, step, lambda n: mx.ones((n, 64)), budget="1GB", target_batch=8,
        ...                  state=optimizer, progress=False)
        >>> fit.batch_size * fit.accumulation_steps
        8
    """
    started = time.perf_counter()
    ranks = Ranks(group)
    ranks.agree(lambda: require_functions(step, make_batch, linear_step))
    sizes = agreed_sizes(ranks, min_batch, max_batch, multiple_of, target_batch)
    steps = ranks.agree(lambda: whole_number(steps, "steps", least=1))
    if not 0 <= tolerance < 1:
        raise InvalidArgumentError(f"tolerance={tolerance!r}: give a share from 0 up to below 1, such as 0.01.")
    budget_of_rank = ranks.agree(lambda: resolve_budget(budget))
    allowed = ranks.smallest(int(budget_of_rank))
    blocks, notes = _with_blocks(model, checkpoint, select)
    may_throttle = devices.backend() != "metal" if throttle is None else throttle
    if not may_throttle:
        because = "throttle=False" if throttle is not None else "nobody has measured lower ones on Metal yet"
        notes.append(f"No memory limit below the budget was tried: {because}.")
    whole = (model, state)
    with (
        uninterrupted(),
        quick_collections(),
        Snapshot(whole, spill=True) as before,
        progress_bar("autofit", enabled=progress and ranks.rank == 0) as bar,
    ):
        notes += slow_half_precision(whole, bar)
        survey = Survey(
            model, step, make_batch, sizes[0], whole, select, bar, ranks.largest_figure, blocks, linear_step
        )
        trials = Trials(
            survey,
            allowed,
            steps=steps,
            throttle=may_throttle,
            tolerance=tolerance,
            ranks=ranks,
            recover=before.restore,
            bar=bar,
        )
        search = Search(survey, sizes, trials, bar)
        best = search.run(keep_usual=target_batch is None)
    return _result(
        search,
        best,
        target_batch=target_batch,
        budget_source=_source(budget_of_rank, allowed),
        notes=[*notes, *survey.notes, *search.notes],
        seconds=time.perf_counter() - started,
    )


def _with_blocks(model: nn.Module, checkpoint: bool, select: Select | None) -> tuple[bool, list[str]]:
    """True where there are blocks to choose from, and the reason where not."""
    if not checkpoint:
        if select is not None:
            raise InvalidArgumentError("select says which blocks may be checkpointed, and checkpoint=False that none.")
        why = "Blocks are as they were: checkpoint=False, or mlx-tune lora without --grad-checkpoint auto."
        return False, [why]
    try:
        find_blocks(model, select)
    except CheckpointError as error:
        if select is not None:
            raise
        return False, [f"Nothing was checkpointed: {str(error).partition(':')[0]}."]
    return True, []


def _source(own: MemoryBudget, allowed: int) -> str:
    return str(own) if allowed == int(own) else str(MemoryBudget(allowed, "the smallest of all ranks"))


def _result(
    search: Search,
    chosen: Candidate,
    *,
    target_batch: int | None,
    budget_source: str,
    notes: list[str],
    seconds: float,
) -> Fit:
    measured, per_row, ways = chosen.measured, search.items_per_row, search.survey.ways
    assert measured is not None
    ordered = sorted(search.candidates, key=lambda c: (c.floor_bytes, c.batch_size))
    keep = set(unbeaten([(c.floor_bytes, -search.predicted(c)) for c in ordered]))
    settings = [_setting(c, search, c is chosen, i in keep) for i, c in enumerate(ordered)]
    return Fit(
        batch_size=chosen.batch_size,
        accumulation_steps=1 if target_batch is None else int(target_batch) // chosen.batch_size,
        paths=ways.chosen(chosen.choice),
        found=len(ways.paths),
        limit_bytes=measured.limit_bytes,
        cache_limit_bytes=cache_room(search.budget, measured.peak_bytes),
        budget_bytes=search.budget,
        budget_source=budget_source,
        predicted_peak_bytes=chosen.floor_bytes,
        peak_bytes=measured.peak_bytes,
        predicted_rate=(chosen.foreseen or search.predicted(chosen)) * per_row,
        measured_rate=chosen.rows_per_second * per_row,
        measured_seconds=measured.seconds,
        unit=search.unit,
        trials=tuple(settings),
        search_seconds=seconds,
        notes=tuple(notes),
        loss=ways.loss(chosen.choice),
        _model=search.survey.model,
    )


def _setting(candidate: Candidate, search: Search, chosen: bool, undominated: bool) -> Setting:
    """One row of the result."""
    known = Setting(
        batch_size=candidate.batch_size,
        checkpointed=len(search.survey.ways.chosen(candidate.choice)),
        floor_bytes=candidate.floor_bytes,
        predicted_rate=(candidate.foreseen or search.predicted(candidate)) * search.items_per_row,
        loss=search.survey.ways.loss(candidate.choice),
        known_as=candidate.known_as,
        unbeaten=undominated,
        chosen=chosen,
    )
    measured, standing = candidate.measured, candidate.standing
    if measured is None:
        return known
    if standing is not None and not standing.turns:
        standing = None  # there was nothing to time it against
    if candidate.died:
        return replace(known, limit_bytes=measured.limit_bytes, fits=False)
    return replace(
        known,
        limit_bytes=measured.limit_bytes,
        peak_bytes=measured.peak_bytes,
        seconds=measured.seconds,
        rate=candidate.rows_per_second * search.items_per_row,
        fits=measured.fits,
        behind=None if standing is None else _finite(standing.behind),
        uncertainty=None if standing is None else _finite(standing.uncertainty),
        turns=0 if standing is None else standing.turns,
    )


def _finite(figure: float) -> float | None:
    """A figure that JSON can hold."""
    return figure if math.isfinite(figure) else None
