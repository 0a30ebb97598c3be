"""`autobatch`: the largest batch that fits, found without running out of memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

from mlx_tune.batching.probe import MakeBatch, Probe, Step
from mlx_tune.batching.result import AutobatchResult, Trial
from mlx_tune.batching.search import Found, Measured, search
from mlx_tune.errors import BudgetError, InvalidArgumentError
from mlx_tune.memory import MemoryBudget, resolve_budget
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.units import format_bytes

#: Where no `max_batch` is given, sizes end here.
_NO_MAXIMUM = 1 << 32


def autobatch(
    step: Step,
    make_batch: MakeBatch,
    *,
    budget: str | SupportsIndex | float | None = None,
    min_batch: int = 1,
    max_batch: int | None = None,
    multiple_of: int = 1,
    target_batch: int | None = None,
    state: Any = (),
    steps: int = 2,
    slowdown: float | None = None,
    prefer: Literal["largest", "fastest"] = "largest",
    progress: bool = True,
) -> AutobatchResult:
    """Find the largest batch that fits a budget.

    Args:
        step: Runs one real training step on a batch (forward, gradients, update) and returns arrays, the loss first.
        make_batch: Makes a batch of n rows as long as they ever get.
        budget: Bytes, text such as "24GB", a share of what is free such as 0.8, or None for `memory_budget()`.
        min_batch: The smallest size that may be answered.
        max_batch: The largest; None for no maximum.
        multiple_of: Sizes must divide by this, such as the number of machines that share a batch.
        target_batch: Answer a divisor of this, with the `accumulation_steps` that multiply to it.
        state: What the step updates, such as `(model, optimizer)`: afterwards it is what it was.
        steps: Real steps that confirm each size.
        slowdown: How much longer than unhindered a step may take.
        prefer: "largest", or "fastest" for the smallest batch within 2 % of the best rate.
        progress: Show what is being tried on standard error.

    Returns:
        The batch size, the memory limit that it was measured under, and the trials.

    Raises:
        InvalidArgumentError: Arguments that contradict one another.
        BudgetError: Not even the smallest size fits.
        TrialError: The step cannot be measured.
    """
    sizes = _sizes(min_batch, max_batch, multiple_of, target_batch)
    if steps < 1:
        raise InvalidArgumentError(f"steps={steps}: a trial takes at least one step.")
    bytes_allowed = resolve_budget(budget)
    started = time.perf_counter()
    trials: list[Trial] = []
    probe = Probe(step, make_batch, state, int(bytes_allowed), steps)
    with progress_bar("autobatch", enabled=progress) as bar, Snapshot(state, spill=True):
        found = _search(probe, sizes, trials, bar)
    if found.size is None:
        raise _too_large(trials[0], bytes_allowed)
    return _result(found.size, found, trials, bytes_allowed, probe, target_batch, time.perf_counter() - started)


def _search(probe: Probe, sizes: Sequence[int], trials: list[Trial], bar: Bar) -> Found:
    def measure(size: int, predicted: int | None) -> Measured:
        foreseen = "" if predicted is None else f", predicted {format_bytes(predicted)} of {format_bytes(probe.budget_bytes)}"
        bar.update(text=f"trying batch size {size}{foreseen}")
        trial = probe.trial(size, predicted)
        trials.append(trial)
        return Measured(trial.fits, trial.floor_bytes)

    return search(measure, sizes, probe.budget_bytes)


def _sizes(min_batch: int, max_batch: int | None, multiple_of: int, target_batch: int | None) -> Sequence[int]:
    """Every size that may be answered, ascending."""
    for name, value in (("min_batch", min_batch), ("max_batch", max_batch), ("multiple_of", multiple_of), ("target_batch", target_batch)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"{name}={value}: give a whole number of at least 1.")
    if max_batch is not None and min_batch > max_batch:
        raise InvalidArgumentError(f"min_batch={min_batch} is above max_batch={max_batch}: no size lies between.")
    first = -(-min_batch // multiple_of) * multiple_of
    last = max_batch if max_batch is not None else _NO_MAXIMUM
    sizes: Sequence[int] = range(first, last + 1, multiple_of)
    if target_batch is not None:
        sizes = tuple(n for n in range(first, min(last, target_batch) + 1, multiple_of) if target_batch % n == 0)
    if not sizes:
        between = f"between min_batch={min_batch} and max_batch={max_batch}"
        divides = "" if target_batch is None else f" and divides target_batch={target_batch}"
        raise InvalidArgumentError(f"No multiple of {multiple_of} lies {between}{divides}.")
    return sizes


def _too_large(trial: Trial, budget: MemoryBudget) -> BudgetError:
    needed = trial.floor_bytes
    size = trial.batch_size
    if needed is None:
        return BudgetError(f"Batch size {size} does not fit {budget}: {trial.reason}.", budget_bytes=int(budget))
    return BudgetError(
        f"Batch size {size} does not fit: a step takes {format_bytes(needed)}, which is "
        f"{format_bytes(needed - int(budget))} above the budget of {budget}.",
        needed_bytes=needed,
        budget_bytes=int(budget),
    )


def _result(
    size: int,
    found: Found,
    trials: list[Trial],
    budget: MemoryBudget,
    probe: Probe,
    target_batch: int | None,
    seconds: float,
) -> AutobatchResult:
    chosen = next(trial for trial in trials if trial.batch_size == size)
    return AutobatchResult(
        batch_size=size,
        accumulation_steps=1 if target_batch is None else target_batch // size,
        peak_bytes=chosen.peak_bytes or 0,
        limit_bytes=chosen.limit_bytes,
        cache_limit_bytes=chosen.cache_limit_bytes,
        budget_bytes=int(budget),
        budget_source=str(budget),
        seconds=chosen.seconds or 0.0,
        items_per_second=chosen.items_per_second or 0.0,
        unit="tokens" if chosen.items != chosen.batch_size else "rows",
        trials=tuple(trials),
        next_size=found.next_size,
        next_bytes=found.next_bytes,
        next_measured=found.next_measured,
        search_seconds=seconds,
    )
