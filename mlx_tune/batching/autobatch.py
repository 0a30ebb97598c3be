"""`autobatch`: the largest batch that fits, found without running out of memory."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

from mlx_tune.batching.forecast import Forecast, floor_of
from mlx_tune.batching.probe import MakeBatch, Probe, Step, arrays_in
from mlx_tune.batching.result import AutobatchResult, Trial
from mlx_tune.batching.search import Found, Measured, search
from mlx_tune.errors import BudgetError, InvalidArgumentError, TraceError
from mlx_tune.memory import MemoryBudget, resolve_budget
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.units import format_bytes

#: Where no `max_batch` is given, sizes end here.
_NO_MAXIMUM = 1 << 32
#: A size predicted to take this share of the budget may be the answer, and gets its real steps at once.
_NEAR = 0.85
#: With an estimate, the first trial goes this far from the smallest size's floor towards the budget.
_FIRST = 0.1
#: An estimate this far above the budget rules the smallest size out without a trial.
_CERTAIN = 1.1


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
    _check_room(bytes_allowed, state)
    started = time.perf_counter()
    with progress_bar("autobatch", enabled=progress) as bar, Snapshot(state, spill=True):
        session = _Session(Probe(step, make_batch, state, int(bytes_allowed)), sizes, steps, bar)
        found = session.run()
    if found.size is None:
        raise _too_large(session, bytes_allowed)
    return _result(found.size, found, session, bytes_allowed, target_batch, time.perf_counter() - started)


class _Session:
    """One search: remembers each size's trial, so that the answer can be looked at again."""

    def __init__(self, probe: Probe, sizes: Sequence[int], steps: int, bar: Bar) -> None:
        self.probe, self.sizes, self.steps, self.bar = probe, sizes, steps, bar
        self.known: dict[int, Trial] = {}
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self.forecast: Forecast | None = None

    def run(self) -> Found:
        """Search; an answer that has been through fewer real steps than asked for takes them, and may fail yet."""
        start = self._look_ahead()
        while True:
            found = search(self._measure, self.sizes, self.probe.budget_bytes, shape=self.forecast, start=start)
            if found.size is None or self.known[found.size].steps >= self.steps:
                return found
            self._try(found.size, self.known[found.size].held_bytes, self.steps)

    def _look_ahead(self) -> int:
        """Read the graph where that is possible; returns the position of the first size to try."""
        self.bar.update(text="reading the step's graph")
        estimate = floor_of(self.probe.step, self.probe.make_batch, self.probe.state)
        budget = self.probe.budget_bytes
        try:
            smallest = estimate(self.sizes[0])
            if smallest > _CERTAIN * budget:
                self._rule_out(smallest)
                return 0
            self.probe.warm(self.sizes[0])  # from here on the optimizer's state is there to be counted
            self.forecast = Forecast(estimate, self.sizes, budget)
        except TraceError as error:
            self.notes.append(f"two small trials took the place of an estimate: {str(error).splitlines()[0]}")
            return 0
        goal = smallest + _FIRST * (budget - smallest)
        return max(0, bisect_right(self.sizes, goal, key=self.forecast) - 1)

    def _rule_out(self, predicted: int) -> None:
        """Note that the smallest size is predicted not to fit; it is not tried."""
        size = self.sizes[0]
        trial = Trial(size, predicted, self.probe.budget_bytes, floor_bytes=predicted, reason="predicted, not tried")
        self.known[size] = trial
        self.trials.append(trial)

    def _measure(self, size: int, predicted: int | None) -> Measured:
        if size not in self.known:
            near = predicted is not None and predicted >= _NEAR * self.probe.budget_bytes
            self._try(size, predicted, self.steps if near else 1)
        trial = self.known[size]
        return Measured(trial.fits, trial.held_bytes)

    def _try(self, size: int, predicted: int | None, steps: int) -> None:
        budget = format_bytes(self.probe.budget_bytes)
        foreseen = "" if predicted is None else f", predicted {format_bytes(predicted)} of {budget}"
        self.bar.update(text=f"trying batch size {size}{foreseen}")
        if predicted is None and self.forecast is not None:
            predicted = round(self.forecast(size))
        trials = self.probe.trial(size, predicted, steps)
        self.trials.extend(trials)
        self.known[size] = trials[-1]


def _sizes(min_batch: int, max_batch: int | None, multiple_of: int, target_batch: int | None) -> Sequence[int]:
    """Every size that may be answered, ascending."""
    for name, value in (
        ("min_batch", min_batch),
        ("max_batch", max_batch),
        ("multiple_of", multiple_of),
        ("target_batch", target_batch),
    ):
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


def _check_room(budget: MemoryBudget, state: Any) -> None:
    """See that what is held already leaves something of the budget."""
    import mlx.core as mx

    held = mx.get_active_memory()
    if held < int(budget):
        return
    own = sum(array.nbytes for array in arrays_in(state))
    raise BudgetError(
        f"The budget of {budget} is used up before the first step: MLX's arrays hold {format_bytes(held)}, "
        f"{format_bytes(own)} of it the model and optimizer in state=. Give a larger budget, or make the model "
        f"smaller first (mlx_tune.quantize_model).",
        needed_bytes=held,
        budget_bytes=int(budget),
    )


def _too_large(session: _Session, budget: MemoryBudget) -> BudgetError:
    trial = session.known[session.sizes[0]]
    size, needed = trial.batch_size, trial.held_bytes or trial.floor_bytes
    if needed is None or trial.reason not in (None, "predicted, not tried"):
        return BudgetError(
            f"Batch size {size} does not fit the budget of {budget}: {trial.reason}.", budget_bytes=int(budget)
        )
    how = "is predicted to take" if trial.peak_bytes is None else "takes"
    return BudgetError(
        f"Batch size {size} does not fit: a step {how} {format_bytes(needed)} with dispatch held back, which is "
        f"{format_bytes(needed - int(budget))} above the budget of {budget}.{_advice(session)}",
        needed_bytes=needed,
        budget_bytes=int(budget),
    )


def _advice(session: _Session) -> str:
    """What could be given up, out of the estimate."""
    from mlx_tune.graphs import estimate_memory

    probe = session.probe
    try:
        estimate = estimate_memory(probe.step, probe.make_batch(session.sizes[0]), state=probe.state)
    except TraceError:
        return " Shorter rows or mlx_tune.checkpoint_blocks(model) may bring it down."
    return (
        f" Of that, {format_bytes(estimate.activations_bytes)} are activations kept for the backward pass: "
        f"mlx_tune.checkpoint_blocks(model) saves part of them, by computing them again."
    )


def _result(
    size: int,
    found: Found,
    session: _Session,
    budget: MemoryBudget,
    target_batch: int | None,
    seconds: float,
) -> AutobatchResult:
    chosen = session.known[size]
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
        unit=session.probe.unit,
        trials=tuple(session.trials),
        next_size=found.next_size,
        next_bytes=found.next_bytes,
        next_measured=found.next_measured,
        search_seconds=seconds,
        notes=tuple(session.notes),
    )
