"""Trials that every rank of a search runs at once: they fit only where they fit on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlx_tune.batching.journal import Journal, Runner
from mlx_tune.batching.result import Trial
from mlx_tune.measuring.ranks import Ranks


class SharedRunner:
    """A runner whose trials fit only where they fit on every rank.

    Args:
        runner: This rank's own.
        ranks: All of them.
        journal: The journal around the runner, if there is one. Its knowledge counts only where every rank's knows it:
            a step whose ranks exchange something would wait for one that does not run it.
    """

    def __init__(self, runner: Runner, ranks: Ranks, journal: Journal | None = None) -> None:
        """Wrap this rank's own runner."""
        self.runner, self.ranks, self.journal = runner, ranks, journal

    def trial(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """Measure on every rank at once; the largest peaks, the slowest step and the lowest limit count."""
        trials, error = self.ranks._attempt(lambda: self._own(size, predicted_bytes, steps))
        own = trials[-1] if trials else Trial(size, predicted_bytes, limit_bytes=1)
        row = [
            own.fits,
            _or(own.peak_bytes),
            _or(own.held_bytes),
            _or(own.floor_bytes),
            _or(own.base_bytes),
            own.limit_bytes,
            _or(own.cache_limit_bytes),
            -1 if own.seconds is None else round(own.seconds * 1e6),
            own.steps,
            own.items,
        ]
        rows = self.ranks._share([int(value) for value in row], error)
        fits, peak, held, floor, base, limit, cache, micros, taken, items = zip(*rows, strict=True)
        unfit = [rank for rank, value in enumerate(fits) if not value]
        reason = own.reason if self.ranks.rank in unfit or not unfit else f"it does not fit on rank {unfit[0]}"
        combined = replace(
            own,
            fits=not unfit,
            peak_bytes=_most(peak),
            held_bytes=_most(held),
            floor_bytes=_most(floor),
            base_bytes=_most(base),
            limit_bytes=min(limit),
            cache_limit_bytes=None if min(cache) < 0 else min(cache),
            seconds=None if min(micros) < 0 else max(micros) / 1e6,
            steps=min(taken),
            items=min(items),
            reason=reason,
        )
        return [*(trials or [])[:-1], combined]

    def _own(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """This rank's trials: out of the journals, where they have an answer between them, else measured."""
        if self.journal is None:
            return self.runner.trial(size, predicted_bytes, steps)
        known = self.journal.recall(size, steps)
        verdicts = [row[0] for row in self.ranks._gather([-1 if known is None else int(known[-1].fits)])]
        if 0 in verdicts:
            reason = f"the journal of rank {verdicts.index(0)} says that it does not fit"
            return known or [Trial(size, predicted_bytes, limit_bytes=int(self.journal.budget), reason=reason)]
        return known if known is not None and -1 not in verdicts else self.journal.measure(size, predicted_bytes, steps)


def _or(value: int | None) -> int:
    return -1 if value is None else value


def _most(values: Sequence[int]) -> int | None:
    return max(values) if max(values) >= 0 else None
