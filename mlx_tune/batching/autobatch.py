"""`autobatch`: the largest batch that fits, found without running out of memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mlx_tune.batching.budget_errors import too_large, used_up
from mlx_tune.batching.canary import check_loss
from mlx_tune.batching.isolation import IsolatedProbe
from mlx_tune.batching.journal import Journal, Runner
from mlx_tune.batching.probe import MakeBatch, Probe, Step
from mlx_tune.batching.result import AutobatchResult, Trial
from mlx_tune.batching.session import Session
from mlx_tune.batching.shared_runner import SharedRunner
from mlx_tune.batching.sizes import agreed_sizes
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.garbage import quick_collections
from mlx_tune.graphs.step_calls import require_functions
from mlx_tune.graphs.tracing.trace import step_of_batches
from mlx_tune.interrupts import uninterrupted
from mlx_tune.measuring.forecast import Forecast, timing_margin
from mlx_tune.measuring.half_precision import slow_half_precision
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.measuring.step_floor import StepFloor
from mlx_tune.memory import MemoryBudget, resolve_budget
from mlx_tune.progress import progress_bar
from mlx_tune.state import Snapshot
from mlx_tune.units import Budget, whole_number


def autobatch(
    step: Step | None = None,
    make_batch: MakeBatch | None = None,
    *,
    budget: Budget = None,
    min_batch: int = 1,
    max_batch: int | None = None,
    multiple_of: int = 1,
    target_batch: int | None = None,
    state: object = (),
    steps: int = 2,
    slowdown: float | None = None,
    canary: bool = False,
    isolate: str | None = None,
    trial_timeout: float | None = None,
    journal: str | os.PathLike[str] | None = None,
    group: object = None,
    progress: bool = True,
) -> AutobatchResult:
    """Find the largest batch that fits a budget, exactly, and the memory limit that it fits under.

    A batch fits if there is a memory limit, at or below the budget, under which the peak of real training steps
    stays within the budget, cached buffers included. Sizes are approached from below: the step's graph says what
    each needs, small trials correct that, and no size is run whose predicted peak is above the budget. Whatever the
    trials change in `state`, and the random streams, is put back bit for bit, also when a trial raises or is
    interrupted; it waits on disk meanwhile, so that trials have the memory that training will have.

    Args:
        step: `step(batch)`, `step(x, y)` or `step(**batch)`, as its signature asks for, runs one real training step
            (forward, gradients, update) and returns arrays, the loss first.
        make_batch: Makes a batch of n rows, as long as rows ever get: an array, a tuple or a dictionary.
        budget: Bytes, text such as "24GB", a share of what is free such as 0.8, or None for `memory_budget()`.
        min_batch: The smallest size that may be answered.
        max_batch: The largest, such as the rows of the data set; None for no maximum.
        multiple_of: Sizes must divide by this, such as the number of machines that share a batch.
        target_batch: Answer a divisor of this, with the `accumulation_steps` that multiply to it exactly. The step
            must then hold what accumulating holds, such as a second set of gradients.
        state: Objects that the step updates, such as `(model, optimizer)`: afterwards it is what it was. A list of
            losses or the like that a step keeps elsewhere holds those of the trials, too.
        steps: Real steps that the answer must stand. From the second on, the optimizer's state is there.
        slowdown: Answer the largest batch whose steps take at most this share longer than unhindered ones.
        canary: Check at the answer that the same rows, from the same weights, without dropout, give the same loss
            at batch 1 and at this size.
        isolate: "module:function", a function that returns `(step, make_batch, state)`: each trial then runs in a fresh
            process that calls it, in place of `step`, `make_batch` and `state` here. One that is killed, crashes or
            hangs counts as not fitting.
        trial_timeout: Seconds after which an isolated trial counts as hanging.
        journal: A file in which trials are noted, so that an interrupted search, or one that took the machine down,
            goes on from there.
        group: The `mx.distributed` group to agree with; by default that of `mlx.launch`, where it is at work.
        progress: Show on standard error what is being tried.

    Returns:
        The batch size, its limit and peak, and the trials; train inside `with result.applied():`.

    Raises:
        InvalidArgumentError: Arguments that contradict one another, or mean nothing, or a batch that the step does not
            take.
        BudgetError: Not even the smallest size fits; the text says by how much.
        TrialError: The step or the batches cannot be measured; the text says why.
        DiskError: Too little free disk for what has to wait there, or for the journal.

    Examples:
        >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
        >>> model, optimizer = nn.Linear(256, 256), optim.SGD(0.01)
        >>> grad = nn.value_and_grad(model, lambda model, x: (model(x) ** 2).mean())
        >>> def step(x):
        ...     loss, gradients = grad(model, x)
        ...     optimizer.update(model, gradients)
        ...     return loss
        >>> result = autobatch(step, lambda n: mx.ones((n, 256)), budget="4MB", max_batch=64,
        ...                    state=(model, optimizer), progress=False)
        >>> result.batch_size, result.peak_bytes <= 4_000_000
        (64, True)
    """
    started = time.perf_counter()
    ranks = Ranks(group)
    sizes = agreed_sizes(ranks, min_batch, max_batch, multiple_of, target_batch)
    steps = ranks.agree(lambda: whole_number(steps, "steps", least=1))
    ranks.agree(lambda: _check(slowdown, isolate, trial_timeout, canary, step, make_batch))
    ranks.same(steps=steps, slowdown=slowdown, canary=canary, isolate=isolate is not None, journal=journal is not None)
    own = ranks.agree(lambda: resolve_budget(budget))
    allowed, note = _smallest(own, ranks), None
    if journal is not None:
        asked = None if own.rooms else budget  # a share of what is free is another number of bytes each time
        note = ranks.agree(lambda: Journal(_of_rank(journal, ranks), asked=asked, resolved=allowed))
        allowed = _smallest(note.budget, ranks)
    with progress_bar("autobatch", enabled=progress and ranks.rank == 0) as bar:
        if isolate is not None:
            left = ranks.smallest(ranks.agree(lambda: _beside_parent(allowed)))
            isolated = IsolatedProbe(isolate, left, trial_timeout, note)
            session = Session(_through(isolated, note, ranks), sizes, left, steps, bar, margin=timing_margin())
            session.foresee(lambda: Forecast.of_knots(ranks.first_knots(lambda: isolated.knots(sizes))))
            found = session.largest()
            if found.size is None:
                raise too_large(session, allowed)
            size = _choose(session, found.size, slowdown)
            unit = isolated.unit
        else:
            assert step is not None
            assert make_batch is not None
            ranks.agree(lambda: used_up(allowed, state))
            with uninterrupted(), quick_collections(), ranks.agree(lambda: Snapshot(state, spill=True)) as before:
                step = ranks.agree(partial(step_of_batches, step, make_batch, sizes[0], state))
                probe = Probe(step, make_batch, state, int(allowed), restore=before.restore, ranks=ranks)
                session = Session(_through(probe, note, ranks), sizes, int(allowed), steps, bar, margin=timing_margin())
                session.notes += slow_half_precision(state, bar)
                floor = StepFloor(step, make_batch, state)
                session.look_ahead(
                    ranks.largest_floor(floor), lambda n, least: ranks.any(lambda: probe.warm(n, least) and floor.stale)
                )
                accept = _canary(step, make_batch, state, before, ranks) if canary else None
                found = session.largest(accept)
                if found.size is None:
                    raise too_large(session, allowed, estimated=(step, make_batch, state))
                size = _choose(session, found.size, slowdown)
            unit = probe.unit
    chosen = session.known[size]
    following = found.size == size
    return AutobatchResult(
        batch_size=size,
        accumulation_steps=1 if target_batch is None else int(target_batch) // size,
        peak_bytes=chosen.peak_bytes or 0,
        limit_bytes=chosen.limit_bytes,
        cache_limit_bytes=chosen.cache_limit_bytes,
        budget_bytes=session.budget_bytes,
        budget_source=str(allowed),
        seconds=chosen.seconds or 0.0,
        items_per_second=chosen.items_per_second or 0.0,
        unit=unit,
        trials=tuple(session.trials),
        next_size=found.next_size if following else None,
        next_bytes=found.next_bytes if following else None,
        next_measured=found.next_measured and following,
        search_seconds=time.perf_counter() - started,
        notes=tuple(session.notes),
        unhindered_size=session.unhindered(found.size),
    )


def autobatch_by_length(
    step: Step,
    make_batch: Callable[[int, int], object],
    lengths: Sequence[int],
    *,
    budget: Budget = None,
    **options: Any,
) -> dict[int, AutobatchResult]:
    """Find the largest batch for each length of bucketed data, all under one budget.

    Each length is a search of its own, the longest rows first, since those are the ones that may not fit at all.

    Args:
        step: As for `autobatch`.
        make_batch: Makes a batch of n rows of a length: `make_batch(n, length)`.
        lengths: The lengths of the buckets, in any order.
        budget: As for `autobatch`; read once, for all lengths.
        **options: Further arguments of `autobatch`, except `isolate`.

    Returns:
        The result of each length, in ascending order of length.

    Raises:
        InvalidArgumentError: No lengths, or one that is below 1.

    Examples:
        >>> import mlx.core as mx, mlx.nn as nn
        >>> model = nn.Embedding(64, 64)
        >>> grad = nn.value_and_grad(model, lambda tokens: model(tokens).square().mean())
        >>> results = autobatch_by_length(grad, lambda n, length: mx.ones((n, length), mx.int32), [16, 32],
        ...                               budget="20MB", state=model, max_batch=8, progress=False)
        >>> {length: result.batch_size for length, result in results.items()}
        {16: 8, 32: 8}
    """
    lengths = [whole_number(length, "a length of lengths", least=1) for length in lengths]
    if not lengths:
        raise InvalidArgumentError("lengths=[]: give at least one length.")
    if "isolate" in options:
        raise InvalidArgumentError("autobatch_by_length runs in this process: it does not take isolate.")
    allowed = resolve_budget(budget)
    journal = options.pop("journal", None)
    results: dict[int, AutobatchResult] = {}
    for length in sorted(set(lengths), reverse=True):
        own = None if journal is None else f"{os.fspath(journal)}.length{length}"
        results[length] = autobatch(step, partial(_swapped, make_batch, length), budget=allowed, journal=own, **options)
    return {length: results[length] for length in sorted(results)}


def _swapped(make_batch: Callable[[int, int], object], length: int, n: int) -> object:
    return make_batch(n, length)


def _through(runner: Runner, journal: Journal | None, ranks: Ranks) -> Runner:
    """The runner with what is asked for around it: ranks agree on what their journals say."""
    if journal is not None:
        journal.runner, runner = runner, journal
    return SharedRunner(runner, ranks, journal) if ranks.size > 1 else runner


def _choose(session: Session, answer: int, slowdown: float | None) -> int:
    """The size to answer, the largest that fits being known."""
    return session.before_cliff(answer) if slowdown is None else session.within_slowdown(answer, slowdown)


def _canary(
    step: Step, make_batch: MakeBatch, state: object, before: Snapshot, ranks: Ranks
) -> Callable[[Trial], str | None]:
    def accept(trial: Trial) -> str | None:
        def wrong() -> str | None:
            return check_loss(step, make_batch, state, trial.batch_size, trial.limit_bytes, before.restore)

        own = ranks.agree(wrong)
        all_fine = ranks.smallest(int(own is None))
        return own or (None if all_fine else "the canary's loss is wrong on another rank")

    return accept


def _beside_parent(budget: MemoryBudget) -> int:
    """The budget of a child: the parent's own memory counts against it."""
    import mlx.core as mx

    mx.clear_cache()
    left = int(budget) - mx.get_active_memory()
    if left <= 0:
        used_up(budget, ())
    return left


def _smallest(budget: MemoryBudget, ranks: Ranks) -> MemoryBudget:
    """The smallest budget of all ranks."""
    smallest = ranks.smallest(int(budget))
    return budget if smallest == int(budget) else MemoryBudget(smallest, "the smallest of all ranks")


def _of_rank(journal: str | os.PathLike[str], ranks: Ranks) -> str:
    """A file for each rank, as several may share a disk."""
    return os.fspath(journal) + (f".rank{ranks.rank}" if ranks.size > 1 else "")


def _check(
    slowdown: float | None,
    isolate: str | None,
    trial_timeout: float | None,
    canary: bool,
    step: Step | None,
    make_batch: MakeBatch | None,
) -> None:
    """Refuse arguments that contradict one another."""
    if slowdown is not None and not slowdown >= 0:
        raise InvalidArgumentError(f"slowdown={slowdown}: give a share of at least 0, such as 0.02, or None.")
    if isolate is not None and (not isinstance(isolate, str) or not all(isolate.partition(":"))):
        raise InvalidArgumentError(
            f'isolate={isolate!r}: write it as "module:function"; the function returns (step, make_batch, state) in '
            f"each trial's own process."
        )
    if trial_timeout is not None and not (isolate is not None and trial_timeout > 0):
        raise InvalidArgumentError(
            f"trial_timeout={trial_timeout}: only a trial in its own process can be ended, after more than 0 seconds; "
            f'pass isolate="module:function" with it.'
        )
    if canary and isolate is not None:
        raise InvalidArgumentError("canary=True runs in this process: leave it out with isolate.")
    if isolate is None:
        require_functions(step, make_batch)
