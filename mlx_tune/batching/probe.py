"""One measured trial: real training steps at one batch size, under a memory limit, and what they took."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mlx_tune import devices
from mlx_tune.batching.result import Trial
from mlx_tune.errors import TrialError
from mlx_tune.interrupts import interruptible
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.measuring.step import StepTrial, run_step
from mlx_tune.measuring.step_outcome import count_items, fault_of, first_line, is_out_of_memory
from mlx_tune.measuring.throttle import HOLDING, SHARES, Throttle
from mlx_tune.memory import cache_room
from mlx_tune.trees import arrays_of, nbytes_of
from mlx_tune.units import format_bytes

Step = Callable[..., object]
MakeBatch = Callable[[int], object]

#: How many readings a floor is taken from at the most; single ones spread upwards.
_FLOOR_READINGS = 3
#: A reading this much above the budget needs no second one.
_HOPELESS = 1.2
#: A reading this much above the prediction is taken again.
_SPREAD = 1.02
#: The first step of all is held back only as far as its floor where that is below this share of the budget.
_ROOMY = 0.5
#: Trials below this share of the budget cost little enough to look at how peaks follow the memory limit.
_SMALL = 0.25
#: How far the peaks of other sizes may lie above what one reading said of a share.
_MARGIN = 1.1
#: Shares to fall back to from one under which a step went above the budget.
_LOWER = (HOLDING, 0.6, 0.0)
#: Swap that grows by more than this share of the budget says that the machine no longer copes; less than so many bytes
#: says nothing, as every process of the machine may have caused it.
_SWAP_SHARE, _SWAP_BYTES = 0.02, 64 << 20


@dataclass
class Probe:
    """Runs trials, and remembers from one to the next how a step's peak follows its memory limit.

    Attributes:
        step: Runs one training step on a batch; returns arrays, the loss first.
        make_batch: Makes the longest batch of a size.
        state: Objects that the step updates; evaluated with its results.
        budget_bytes: The limit of peak and cache.
        throttle: The knowledge of limits so far.
        restore: Puts the state back as it was before the first trial.
        ranks: The processes that search. Every step that one rank takes, all take: what decides how many goes through
            here.
        unit: The unit of `Trial.items`: "tokens" or "rows".
        seen: For each size, the memory limit and the peak of every step so far.
    """

    step: Step
    make_batch: MakeBatch
    state: object
    budget_bytes: int
    throttle: Throttle = field(default_factory=Throttle)
    restore: Callable[[], None] | None = None
    ranks: Ranks = field(default_factory=Ranks.alone)
    unit: str = "rows"
    seen: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    _warm: bool = False
    _taken: list[tuple[bool, float]] = field(default_factory=list)  # since the last trial: a size's first; its seconds
    _shapes: dict[tuple[object, ...], int] = field(default_factory=dict)
    _rows: set[tuple[int, int]] | None = None  # axes that were as long as the size, every time

    def warm(self, size: int, floor_bytes: int | None = None) -> bool:
        """Take the first step of all, with dispatch held back; whether that made the optimizer's state.

        Args:
            size: Rows in the batch.
            floor_bytes: The most that the step needs at its floor, where that is known. With every operation held back
                a step takes several times as long, so where there is room it is only held to that.
        """
        before = nbytes_of(self.state)
        limit = 1 if floor_bytes is None or floor_bytes > _ROOMY * self.budget_bytes else floor_bytes
        self._run(self.ranks.agree(lambda: self._batch(size)), limit, Trial(size, None, limit_bytes=limit))
        self._warm = True
        return nbytes_of(self.state) != before

    def trial(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """Measure one batch size.

        Args:
            size: Rows in the batch.
            predicted_bytes: The peak that is expected with dispatch held back, or None where nothing is known.
            steps: The number of real steps to take under the limit that is found.

        Returns:
            One trial for each memory limit that was needed; the last decides. A step that runs out of memory makes
            one that does not fit.

        Raises:
            TrialError: The step or the batch cannot be measured: nothing was computed, the loss is no number.
            Exception: Whatever else the step raises.
        """
        import mlx.core as mx

        swap = devices.swap_used_bytes()
        trials = [Trial(size, predicted_bytes, limit_bytes=self.budget_bytes)]
        try:
            self._measure(trials, steps)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the arrays that did not fit
            trials[-1] = replace(trials[-1], fits=False, reason=f"out of memory ({first_line(error)})")
        gc.collect()
        mx.clear_cache()
        swapped = max(0, devices.swap_used_bytes() - swap)
        trials[-1] = replace(
            trials[-1],
            footprint_bytes=devices.footprint_bytes(),
            swapped_bytes=swapped,
            first_seconds=sum(seconds for first, seconds in self._taken if first),
            repeated_seconds=sum(seconds for first, seconds in self._taken if not first),
        )
        self._taken.clear()
        if swapped > max(_SWAP_BYTES, _SWAP_SHARE * self.budget_bytes):
            trials[-1] = replace(trials[-1], fits=False, reason=f"the system swapped {format_bytes(swapped)}")
        return trials

    def _measure(self, trials: list[Trial], steps: int) -> None:
        """Fill `trials` as far as the measurement gets."""
        import mlx.core as mx

        trial = trials[0]
        batch = self.ranks.agree(lambda: self._batch(trial.batch_size))
        items, self.unit = count_items(batch, trial.batch_size)
        trial = trials[0] = replace(trial, items=items)
        mx.clear_cache()
        if not self._warm:
            self._run(batch, 1, trial)
            self._warm = True
        base = self.ranks.largest(mx.get_active_memory())
        small = trial.predicted_bytes is None or trial.predicted_bytes - base < _SMALL * (self.budget_bytes - base)
        unknown = not self.throttle.worst or (small and SHARES[-1] not in self.throttle.worst)
        holding = None if unknown else self.throttle.holding_share
        readings = self._learn(batch, base, trial) if unknown else self._floor(batch, base, trial)
        held_back = [reading for reading in readings if reading.limit_bytes == 1] if unknown else readings
        floor, held = self._needed(held_back, base, None if unknown else trial.predicted_bytes)
        trial = trials[0] = replace(
            trial, base_bytes=base, floor_bytes=floor, held_bytes=held, peak_bytes=held, limit_bytes=1
        )
        added = max(1, floor - base)
        room, failed = (self.budget_bytes - base) / added, None
        while floor <= self.budget_bytes:
            share = self._share(room, failed)
            limit = self.throttle.limit_at(share, base, floor, self.budget_bytes)
            held_at = readings[0].limit_bytes
            if share == holding and held_at is not None and held_at <= self.budget_bytes:
                limit = held_at  # the same share, of what was expected beforehand
            taken = [reading for reading in readings if reading.limit_bytes == limit]
            if failed is not None:  # one step within the budget, after one that was not, may be a low one
                taken, steps = [], max(steps, 2)
            trials[-1] = self._steps(replace(trial, limit_bytes=limit), batch, steps, taken)
            peak = trials[-1].peak_bytes or 0
            self.throttle.note(share, (peak - base) / added)
            if trials[-1].fits or share == 0:
                return
            failed = share
            trials.append(trial)  # not under this limit: once more under a lower one

    def _needed(self, readings: list[StepTrial], base: int, predicted: int | None) -> tuple[int, int]:
        """The floor that readings show, and the peak to reckon with at the floor.

        Single peaks scatter upwards. How far, several readings show; where there is but one, what earlier ones showed
        is added to it, unless that makes it more than was predicted: then it holds some of that already.
        """
        peaks = [reading.peak_bytes for reading in readings]
        floor = min(peaks)
        scattered = base + int(self.throttle.spread * (floor - base))
        if len(peaks) == 1 and predicted is not None:
            scattered = min(scattered, predicted)
        return floor, max(floor, scattered) if len(peaks) < _FLOOR_READINGS else max(peaks)

    def _share(self, room: float, failed: float | None) -> float:
        """The share to run real steps under.

        Held to the floor they are slow, so they are only where the next higher share is known to need more. Where
        single peaks scatter, those at the floor do as well.
        """
        if failed is None:
            # The one reading at a share may have been a low one, and of a step whose peak was another operation's.
            # Where a limit still holds, that hardly matters.
            free = self.throttle.share_within(room / (_MARGIN * self.throttle.spread))
            return max(free, min(HOLDING, self.throttle.share_within(room)), self.throttle.holding_share)
        lower = [share for share in _LOWER if share < failed and self.throttle.worst.get(share, 0.0) <= room]
        return max(lower, default=0.0)

    def _steps(self, trial: Trial, batch: object, steps: int, taken: list[StepTrial]) -> Trial:
        """Take real steps under the trial's limit, those taken already included, until one is above the budget.

        Peaks scatter, and a limit that is raised brings none down: what was seen at this size under the limit, or a
        lower one, can happen again.
        """
        readings = list(taken)
        while len(readings) < steps and self._highest(trial) <= self.budget_bytes:
            # The cache gets what the peak so far leaves; before the first step that is nothing.
            peak = max((reading.peak_bytes for reading in readings), default=self.budget_bytes)
            readings.append(self._run(batch, trial.limit_bytes, trial, self._cache_room(peak)))
        peak = self._highest(trial)
        return replace(
            trial,
            peak_bytes=peak,
            cache_limit_bytes=self._cache_room(peak),
            seconds=min((reading.seconds for reading in readings), default=None),
            steps=len(readings),
            fits=peak <= self.budget_bytes,
        )

    def _highest(self, trial: Trial) -> int:
        """The highest peak seen so far at a trial's size, under its limit or a lower one."""
        return max((peak for limit, peak in self.seen[trial.batch_size] if limit <= trial.limit_bytes), default=0)

    def _learn(self, batch: object, base: int, trial: Trial) -> list[StepTrial]:
        """Read the floor a few times, and see how peaks rise with the limit while there is room for that."""
        readings: list[StepTrial] = []
        others: list[StepTrial] = []
        expected = 0 if trial.predicted_bytes is None else _SPREAD * trial.predicted_bytes

        def floor() -> int:
            return min(reading.peak_bytes for reading in readings)

        def read_floor() -> None:
            readings.append(self._run(batch, 1, trial))
            highest = max(reading.peak_bytes for reading in readings)
            self.throttle.note(SHARES[0], (highest - base) / max(1, floor() - base))

        def read(share: float) -> bool:
            """Note the peak at a share; False where there is no room for that."""
            added = max(1, floor() - base)
            if not self.throttle.may_try((self.budget_bytes - base) / added):
                return False
            limit = self.throttle.limit_at(share, base, floor(), self.budget_bytes)
            others.append(self._run(batch, limit, trial))
            self.throttle.note(share, (others[-1].peak_bytes - base) / added)
            return True

        read_floor()
        # With every operation held back a step takes several times as long. One such peak is enough where it is the one
        # that was predicted, and the next share's is no higher.
        settled = floor() <= expected and read(HOLDING) and self.throttle.holds(HOLDING)
        while not settled and readings[-1].peak_bytes <= _HOPELESS * self.budget_bytes:
            if len(readings) == _FLOOR_READINGS or (len(readings) > 1 and floor() <= expected):
                break
            read_floor()
        # Where a share holds, smaller ones do, too: those are read only where it does not.
        if (others or read(HOLDING)) and not self.throttle.holds(HOLDING):
            for share in [share for share in SHARES[1:] if share < HOLDING][::-1]:
                if not read(share) or self.throttle.holds(share):
                    break
        for share in [share for share in SHARES if share > HOLDING]:
            if not read(share):
                break
        return readings + others

    def _floor(self, batch: object, base: int, trial: Trial) -> list[StepTrial]:
        """Peaks held to the floor: one, or a few where the first surprises."""
        limit, expected, added = 1, self.budget_bytes, 0
        if trial.predicted_bytes is not None:
            added = max(0, trial.predicted_bytes - base)
            expected = min(expected, int(_SPREAD * trial.predicted_bytes))
            if self.throttle.holding_share > 0:
                limit = max(1, base + int(self.throttle.holding_share * added / self.throttle.spread))
        cache = self._cache_room(min(expected, self.budget_bytes))
        readings = [self._run(batch, limit, trial, cache)]
        while readings[-1].peak_bytes > expected and len(readings) < _FLOOR_READINGS:
            if readings[-1].peak_bytes > _HOPELESS * self.budget_bytes and readings[-1].limit_bytes == 1:
                break
            readings.append(self._run(batch, 1, trial, cache))  # perhaps dispatch was not held back hard enough
        held = [reading.peak_bytes for reading in readings if reading.limit_bytes == 1]
        if len(held) > 1:
            floor = min(reading.peak_bytes for reading in readings)
            self.throttle.note(SHARES[0], (max(held) - base) / max(1, floor - base))
        return readings

    def _cache_room(self, held_bytes: int) -> int | None:
        """The cache limit with which arrays of `held_bytes` and cached buffers stay within the budget together."""
        return cache_room(self.budget_bytes, held_bytes)

    def _batch(self, size: int) -> object:
        """Make a batch, and see that its shapes depend on the size that was asked for."""
        import mlx.core as mx

        with interruptible():
            batch = self.make_batch(size)
            arrays = list(arrays_of(batch))
            mx.eval(arrays)
        shapes = tuple(tuple(array.shape) for array in arrays)
        known = self._shapes.setdefault(shapes, size)
        if shapes and known != size:
            raise TrialError(
                f"make_batch({known}) and make_batch({size}) return arrays of the same shapes, "
                f"{', '.join(str(list(shape)) for shape in shapes)}: make_batch must return as many rows as it is "
                f"asked for. If the data set holds no more than {known} rows, pass max_batch={known}."
            )
        rows = {(i, axis) for i, shape in enumerate(shapes) for axis, n in enumerate(shape) if n == size}
        # An axis is once as long as the size by chance, and hardly twice.
        if self._rows and not self._rows & rows and len(self._shapes) > 2:
            i, axis = min(self._rows)
            given = shapes[i][axis] if i < len(shapes) and axis < len(shapes[i]) else None
            raise TrialError(
                f"make_batch({size}) returned {given} rows, where smaller batches had as many as they were asked for. "
                f"If the data set holds no more than {given} rows, pass max_batch={given}."
            )
        self._rows = rows if self._rows is None else self._rows & rows
        return batch

    def _run(self, batch: object, limit: int, trial: Trial, cache: int | None = None) -> StepTrial:
        """Take one step under a limit and read the counters; see that it computed a loss."""
        reading = self._together(batch, limit, trial.batch_size, cache)
        if reading.fault is not None and self.restore is not None:
            # Many steps on the same rows may have driven the loss to zero, or off: look again from where it began.
            self.restore()
            reading = self._together(batch, limit, trial.batch_size, cache)
        if reading.fault is not None:
            raise TrialError(reading.fault.format(size=trial.batch_size))
        self.seen.setdefault(trial.batch_size, []).append((limit, reading.peak_bytes))
        return reading

    def _together(self, batch: object, limit: int, size: int, cache: int | None) -> StepTrial:
        """A step that all ranks take at once."""
        reading = self.ranks.step(lambda: self._step_once(batch, limit, size, cache))
        self._taken.append((size not in self.seen, reading.seconds))
        return reading

    def _step_once(self, batch: object, limit: int, size: int, cache: int | None) -> StepTrial:
        reading = run_step(self.step, (batch,), self.state, limit, cache_limit_bytes=cache, judge=fault_of)
        if reading.peak_bytes <= reading.base_bytes:
            raise TrialError(
                f"A trial at batch size {size} ran no operation: step(batch) returned without computing anything, so "
                f"every size would seem to fit. step must run the forward pass, the gradients and the update."
            )
        return reading
