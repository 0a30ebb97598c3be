"""One measured trial: real training steps at one batch size, under a memory limit, and what they took."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_tune import devices
from mlx_tune.batching.limits import held
from mlx_tune.batching.result import Trial
from mlx_tune.errors import TrialError
from mlx_tune.memory import track_memory
from mlx_tune.units import format_bytes

Step = Callable[[Any], Any]
MakeBatch = Callable[[int], Any]

#: Texts of the errors by which MLX's allocators refuse; anything else that a step raises is the user's to see.
_OUT_OF_MEMORY = ("out of memory", "unable to allocate", "maximum allowed buffer size", "insufficient memory")
#: How many steps may look for the floor, whose single readings spread upwards by a few per cent.
_FLOOR_TRIES = 3
#: A reading this much above the prediction is taken again with dispatch held back at every operation.
_FLOOR_SPREAD = 1.03
#: How many trials, the smallest ones, look at the overshoot.
_OVERSHOOT_TRIALS = 2
#: The share of its floor that a step is taken to overshoot its limit by at least.
_DEFAULT_OVERSHOOT = 0.05
#: Swap that grows by more than this share of the budget says that the machine no longer copes.
_SWAP_SHARE = 0.02


@dataclass(frozen=True)
class _Reading:
    """What one step took."""

    peak_bytes: int
    active_bytes: int
    seconds: float
    loss: Any


@dataclass
class Probe:
    """Runs trials, and remembers from one to the next how far a step overshoots its memory limit.

    MLX looks at the limit after each operation's outputs are allocated, so a peak can exceed it by what one
    operation allocates, and a step that is held back at all times takes its floor. Hence a limit of the budget less
    the overshoot lets a step run as freely as the budget allows, and keeps it within.

    Attributes:
        step: Runs one training step on a batch; returns arrays, the loss first.
        make_batch: Makes the longest batch of a size.
        state: What the step updates; evaluated with its results.
        budget_bytes: What peak and cache must stay within.
        steps: How many real steps a trial takes under its limit.
    """

    step: Step
    make_batch: MakeBatch
    state: Any
    budget_bytes: int
    steps: int
    overshoot: float = _DEFAULT_OVERSHOOT
    _overshoots: int = 0
    _warm: bool = False
    _shapes: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def trial(self, size: int, predicted_bytes: int | None) -> Trial:
        """Measure one batch size.

        Args:
            size: Rows in the batch.
            predicted_bytes: The floor that is expected, or None where nothing is known.

        Returns:
            The trial. A step that runs out of memory makes one that does not fit.

        Raises:
            TrialError: The step or the batch cannot be measured: nothing was computed, the loss is no number.
            Exception: Whatever else the step raises.
        """
        import mlx.core as mx

        swap = devices.swap_used_bytes()
        before = Trial(size, predicted_bytes, None, None, self.budget_bytes, None, None, 0, fits=False)
        try:
            trial = self._measure(before)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the arrays that did not fit
            trial = _with(before, reason=f"out of memory ({_first_line(error)})")
        gc.collect()
        mx.clear_cache()
        swapped = max(0, devices.swap_used_bytes() - swap)
        trial = _with(trial, footprint_bytes=devices.footprint_bytes(), swapped_bytes=swapped)
        if swapped > _SWAP_SHARE * self.budget_bytes:
            trial = _with(trial, fits=False, reason=f"the system swapped {format_bytes(swapped)}")
        return trial

    def _measure(self, trial: Trial) -> Trial:
        import mlx.core as mx

        size = trial.batch_size
        batch = self._batch(size)
        trial = _with(trial, items=count_items(batch, size)[0])
        mx.clear_cache()
        hold = self._holding_limit(trial.predicted_bytes)
        if not self._warm:
            self._run(batch, 1, self._cache_room(self.budget_bytes), size)  # the first step makes the optimizer's state
            self._warm = True
        floor = self._floor(batch, hold, trial)
        trial = _with(trial, floor_bytes=floor, peak_bytes=floor, limit_bytes=hold)
        if floor > self.budget_bytes:
            return trial
        if self._overshoots < _OVERSHOOT_TRIALS:
            self._learn_overshoot(batch, floor, size)
        limit = max(hold, self.budget_bytes - int(self.overshoot * floor))
        trial = self._steps(trial, batch, limit)
        if not trial.fits and limit > hold:
            # The overshoot was larger than at the sizes before: remember, and hold the step back harder.
            self.overshoot = max(self.overshoot, ((trial.peak_bytes or 0) - limit) / floor)
            trial = self._steps(trial, batch, hold)
        return trial

    def _learn_overshoot(self, batch: Any, floor: int, size: int) -> None:
        """See by how much of its floor a step exceeds a limit that is just too tight for it."""
        limit = max(1, int(0.9 * floor))
        if floor + max(0.2, 2 * self.overshoot) * floor > self.budget_bytes:
            return  # no room for a reading that may run over
        self._overshoots += 1
        for _ in range(2):
            reading = self._run(batch, limit, self._cache_room(limit), size)
            self.overshoot = max(self.overshoot, (reading.peak_bytes - limit) / floor)

    def _steps(self, trial: Trial, batch: Any, limit: int) -> Trial:
        cache = self._cache_room(min(self.budget_bytes, limit + int(self.overshoot * (trial.floor_bytes or 0))))
        readings = [self._run(batch, limit, cache, trial.batch_size) for _ in range(self.steps)]
        peak = max(reading.peak_bytes for reading in readings)
        cache_room = self._cache_room(peak)
        if cache is not None and cache_room is not None:
            cache = min(cache, cache_room)
        return _with(
            trial,
            peak_bytes=peak,
            limit_bytes=limit,
            cache_limit_bytes=cache,
            seconds=min(reading.seconds for reading in readings),
            fits=peak <= self.budget_bytes,
        )

    def _holding_limit(self, predicted_bytes: int | None) -> int:
        """A limit low enough for the floor to show, and no lower than that takes: full throttling is slow."""
        if not self._overshoots or predicted_bytes is None:
            return 1
        return max(1, int(predicted_bytes * (1 - max(2 * self.overshoot, 0.5))))

    def _floor(self, batch: Any, limit: int, trial: Trial) -> int:
        """The least that a step of this size needs: the smallest of a few readings, where the first surprises."""
        expected = self.budget_bytes
        if trial.predicted_bytes is not None and limit > 1:
            expected = min(expected, int(_FLOOR_SPREAD * trial.predicted_bytes))
        readings: list[int] = []
        while len(readings) < _FLOOR_TRIES:
            readings.append(self._run(batch, limit, self._cache_room(self.budget_bytes), trial.batch_size).peak_bytes)
            if readings[-1] <= expected:
                break
            limit, expected = 1, self.budget_bytes
        return min(readings)

    def _cache_room(self, held_bytes: int) -> int | None:
        """The cache limit with which arrays of `held_bytes` and cached buffers stay within the budget together."""
        if devices.backend() != "cpu":
            return None  # the memory limit releases cached buffers itself
        return max(0, min(_default_cache_limit(), self.budget_bytes - held_bytes))

    def _batch(self, size: int) -> Any:
        """Make a batch, and see that its shapes depend on the size that was asked for."""
        import mlx.core as mx

        batch = self.make_batch(size)
        mx.eval(arrays_in(batch))
        shapes = tuple(tuple(array.shape) for array in arrays_in(batch))
        known = self._shapes.setdefault(shapes, size)
        if shapes and known != size:
            raise TrialError(
                f"make_batch({known}) and make_batch({size}) return arrays of the same shapes, "
                f"{', '.join(str(list(shape)) for shape in shapes)}: make_batch must return as many rows as it is asked "
                f"for. If the data set holds no more than {known} rows, pass max_batch={known}."
            )
        return batch

    def _run(self, batch: Any, limit: int, cache_limit: int | None, size: int) -> _Reading:
        """Take one step under a limit, everything that it computes evaluated, and read the counters."""
        import mlx.core as mx

        gc.collect()
        before = mx.get_active_memory()
        with held(limit, cache_limit), track_memory() as memory:
            out = self.step(batch)
            mx.eval(arrays_in(out), arrays_in(self.state))
            mx.synchronize()
            mx.eval(mx.zeros(1) + 1)  # on Metal, an error that was stored by the work above comes out here (mlx#4174)
        arrays = arrays_in(out)
        if not arrays:
            raise TrialError(
                f"step(batch) returned {_described(out)}: it must return arrays, the loss first, so that a trial "
                f"knows what to evaluate."
            )
        if memory.peak_bytes <= before:
            raise TrialError(
                f"A trial at batch size {size} ran no operation: step(batch) returned without computing anything, so "
                f"every size would seem to fit. step must run the forward pass, the gradients and the update."
            )
        loss = arrays[0]
        _check_loss(loss, size)
        return _Reading(memory.peak_bytes, memory.active_bytes, memory.seconds, loss)


def _check_loss(loss: Any, size: int) -> None:
    import mlx.core as mx

    values = loss.astype(mx.float32) if loss.dtype != mx.float32 else loss
    if not bool(mx.all(mx.isfinite(values))):
        raise TrialError(
            f"The loss at batch size {size} is not finite. Check that step returns the loss first, and that a few "
            f"steps at this learning rate do not diverge."
        )
    if not bool(mx.any(values != 0)):
        raise TrialError(
            f"The loss at batch size {size} is zero. A step that ran out of memory can leave zeros on some versions "
            f"of MLX (mlx#4134), so this cannot be told from a result. Check that step returns the loss first."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is one by which an allocator of MLX refuses."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(part in text for part in _OUT_OF_MEMORY)


def arrays_in(tree: Any) -> list[Any]:
    """Every array in nested dictionaries, lists, tuples, modules and optimizers."""
    import mlx.core as mx
    from mlx.optimizers import Optimizer

    if isinstance(tree, mx.array):
        return [tree]
    if isinstance(tree, Optimizer):
        return arrays_in(tree.state)
    if isinstance(tree, dict):
        return [array for value in tree.values() for array in arrays_in(value)]
    if isinstance(tree, (list, tuple)):
        return [array for value in tree for array in arrays_in(value)]
    return []


def count_items(batch: Any, size: int) -> tuple[int, str]:
    """How much work a batch is: its tokens where its first array is `[batch, length]` of integers, else its rows."""
    import mlx.core as mx

    arrays = arrays_in(batch)
    if arrays and arrays[0].ndim == 2 and mx.issubdtype(arrays[0].dtype, mx.integer):
        return int(arrays[0].size), "tokens"
    return size, "rows"


def _default_cache_limit() -> int:
    """The cache limit in force; MLX only tells it to whoever sets it."""
    import mlx.core as mx

    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def _with(trial: Trial, **changes: Any) -> Trial:
    from dataclasses import replace

    return replace(trial, **changes)


def _described(out: Any) -> str:
    return "None" if out is None else f"a {type(out).__name__} without arrays"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
