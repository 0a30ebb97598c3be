"""The search behind `autofit`: predict every setting, run the few that matter, time the close ones in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from mlx_tune.checkpointing.planning.choose import Choice, relaxed
from mlx_tune.checkpointing.planning.survey import Survey, does_not_fit
from mlx_tune.fitting.predict import Pace, pace_through, thinned
from mlx_tune.fitting.trials import Candidate, Trials
from mlx_tune.interrupts import interruptible
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN, cheapest_fitting, largest_fitting
from mlx_tune.measuring.step_outcome import count_items
from mlx_tune.measuring.throttle import OVERSHOOT
from mlx_tune.progress import Bar
from mlx_tune.units import format_seconds

#: How many sizes without any checkpointing, and how many with some, are looked at.
_PLAIN_SIZES, _LARGER_SIZES = 5, 4
#: mlx-lm's default, looked at where it fits: nobody should be slower than without this library.
USUAL_BATCH = 4
#: Checkpointing that is predicted to be this much slower than what was run is not run.
_HOPELESS = 1.15
#: Nor if a step of it is predicted to take this long and to gain nothing.
_PATIENCE_SECONDS = 30.0
#: How many settings that nobody would think of are run, if they promise more than all that were.
_MOST_FURTHER = 3
#: Settings within this share of the best measured rate are timed in turns, at most so many at once, at first so often.
_CLOSE, _MOST_RACERS, _FIRST_TURNS = 0.75, 6, 5
#: Those that came in no further behind than this are timed again with others that were run after them.
_BEHIND = 0.1
#: What the settings that anybody would try are called.
PLAIN, EVERY, USUAL = "largest without checkpoints", "largest with every block checkpointed", "mlx-lm's default batch"
LINEAR = "largest with the linear loss alone"


class Search:
    """One search: what may be run, and what was.

    Args:
        survey: The step, at the smallest size.
        sizes: Batch sizes that may be answered, ascending.
        trials: Runs settings.
        bar: Told what is going on.
    """

    def __init__(self, survey: Survey, sizes: Sequence[int], trials: Trials, bar: Bar) -> None:
        """Note what to look for; nothing is run yet."""
        self.survey, self.sizes, self.trials, self.bar = survey, sizes, trials, bar
        self.budget, self.tolerance = trials.budget, trials.tolerance
        # Without throttling nothing brings a peak down that dispatch has run up, so floors need more room.
        self.goal = int(self.budget / (1 + (ESTIMATE_MARGIN if trials.throttle else OVERSHOOT)))
        self.candidates: list[Candidate] = []
        self.points: dict[int, float] = {}  # sizes, and the seconds of their steps without what is done twice
        self.pace = Pace(0.0, 1.0)
        self.rate = 0.0  # the highest of a setting that was run and fits, in rows a second
        self.unit, self.items_per_row = "rows", 1.0
        self.notes: list[str] = []

    def run(self, keep_usual: bool) -> Candidate:
        """Predict, measure what matters, and return the setting to train with.

        Args:
            keep_usual: True where, of settings that are equally fast, batches below `USUAL_BATCH` come last.
        """
        survey = self.survey
        if survey.floor(survey.all) > self.budget:
            raise does_not_fit(survey, self.budget)
        self.bar.update(text="largest batch with every block checkpointed")
        largest = self.largest(survey.all) or self.sizes[0]
        studied = thinned(self.sizes, self.sizes[0], max(self.sizes[0], largest // 4), 1)[-1]
        survey.batch_size = studied
        survey.study(self.trials.weigh, self.budget, self.sizes)
        count = partial(_count, survey, studied)
        items, self.unit = self.trials.ranks.agree(count)
        self.items_per_row = items / studied
        self.bar.update(text="largest batch with no block checkpointed")
        self.collect(self.largest(survey.none), largest)
        survey.release()
        self.climb()
        measured = [c for c in self.candidates if c.fits] or [self.last_resort()]
        # The smallest runs along: it costs little, and a line needs points that are far apart.
        smallest = min(measured, key=lambda c: c.batch_size)
        racers = self.close(measured)
        finished = self.trials.in_turns([*racers, *([smallest] if smallest not in racers else [])], _FIRST_TURNS)
        self.learn_from(finished)
        self.try_known()
        self.try_further()
        fresh = [c for c in self.candidates if c.fits and c not in measured]
        contenders = [c for c in finished if c.behind <= _BEHIND] + self.close(fresh)
        if len(contenders) > 1 and (fresh or self.undecided(contenders)):
            others = [c for c in finished if c not in contenders]
            finished = self.trials.in_turns(contenders, max(3, 4 * self.trials.steps + 1))
            for other in others:  # they were held against the one that was the fastest then
                other.fall_back(contenders[0].behind)
        best = self.settle(finished, keep_usual)
        while not self.trials.steady(best):
            finished = [c for c in finished if c.fits] or [c for c in self.candidates if c.fits] or [self.last_resort()]
            best = self.settle(finished, keep_usual)
        return best

    def largest(self, choice: Choice, goal: int | None = None) -> int | None:
        """The largest batch whose floor under a choice leaves the margin."""
        goal = self.goal if goal is None else goal
        return largest_fitting(self.sizes, lambda n: self.survey.floor(choice, n), goal)

    def collect(self, plain: int | None, largest: int) -> None:
        """The settings to predict: sizes without checkpointing, and larger ones with just as much as they need."""
        survey = self.survey
        if plain is not None:
            self.add(plain, survey.none, PLAIN)
            if plain >= USUAL_BATCH and USUAL_BATCH in self.sizes:
                self.add(USUAL_BATCH, survey.none, USUAL)
            for n in thinned(self.sizes, max(1, plain // 64), plain, _PLAIN_SIZES):
                self.add(n, survey.none)
        for n in thinned(self.sizes, (plain or 0) + 1, largest, _LARGER_SIZES) if survey.all != survey.none else ():
            self.bar.update(text=f"estimating batch {n}")

            def floor(choice: Choice, n: int = n) -> int:
                return survey.floor(choice, n)

            # Half of what a limit commonly overshoots is left, so that it need not throttle hard.
            limit = int(self.budget / (1 + OVERSHOOT / 2))
            index = cheapest_fitting(survey.choices, floor, limit)
            if index is not None:
                self.add(n, relaxed(survey.choices[index], survey.kinds, survey.extra_seconds, floor, limit))
        linear = survey.ways.with_loss(survey.none, linear=True)
        if survey.ways.two and (alone := self.largest(linear)) is not None:
            self.add(alone, linear, LINEAR)
        if survey.paths or plain is None:
            self.add(largest, survey.all, EVERY if survey.paths else PLAIN)

    def add(self, batch_size: int, choice: Choice, known_as: str = "") -> Candidate:
        """Note a setting, once; one that has several names keeps them all."""
        for known in self.candidates:
            if (known.batch_size, known.choice) == (batch_size, choice):
                known.known_as = ", ".join(name for name in (known.known_as, known_as) if name)
                return known
        self.candidates.append(Candidate(batch_size, choice, self.survey.floor(choice, batch_size), known_as))
        return self.candidates[-1]

    def climb(self) -> None:
        """Run rising sizes, each with as little computed twice as it can have, for as long as larger ones promise more.

        Small steps are cheap and say how time grows with the batch; where the rate no longer grows, a step that fills
        the budget would only take long. The first two are always run, and so are those that anybody would try.
        """
        rungs: dict[int, Candidate] = {}
        for candidate in sorted(self.candidates, key=self.extra):
            rungs.setdefault(candidate.batch_size, candidate)
        for _, candidate in sorted(rungs.items()):
            for_certainty = bool(candidate.known_as) and self.affordable(candidate) and not self.hopeless(candidate)
            if len(self.points) < 2 or for_certainty or self.promising(candidate):
                self.measure(candidate)

    def try_known(self) -> None:
        """Run the settings that anybody would try, unless one is predicted to be hopeless."""
        for candidate in [c for c in self.candidates if c.known_as and c.measured is None]:
            if self.hopeless(candidate):
                self.notes.append(
                    f"Batch {candidate.batch_size} ({candidate.known_as}) was not run: it is predicted to be "
                    f"{1 - self.predicted(candidate) / self.rate:.0%} slower than the fastest that was."
                )
            elif self.promising(candidate) or self.affordable(candidate):
                self.measure(candidate)
            else:
                self.notes.append(
                    f"Batch {candidate.batch_size} ({candidate.known_as}) was not run: a step is predicted to take "
                    f"{format_seconds(self.predicted_seconds(candidate))} and to gain nothing."
                )

    def try_further(self) -> None:
        """Run the settings that promise more than all that were run, and fewer rows of one that the limit held back."""
        for candidate in self.candidates:
            candidate.foreseen = candidate.foreseen or self.predicted(candidate)
        waiting = [c for c in self.candidates if c.measured is None and self.promising(c)]
        for candidate in sorted(waiting, key=self.predicted, reverse=True)[:_MOST_FURTHER]:
            self.measure(candidate)
        held_back = [c for c in self.candidates if c.held_back and c.rows_per_second >= _CLOSE * self.rate]
        if held_back:
            best = max(held_back, key=lambda c: c.rows_per_second)
            fewer = self.largest(best.choice, int(self.budget / (1 + OVERSHOOT)))
            if fewer is not None and fewer < best.batch_size:
                self.measure(self.add(fewer, best.choice))

    def promising(self, candidate: Candidate) -> bool:
        """True where a setting is predicted to be faster than what was run."""
        return self.predicted(candidate) > self.rate

    def hopeless(self, candidate: Candidate) -> bool:
        """True where what a setting computes twice is predicted to cost far more than its size gains."""
        return self.extra(candidate) > 0 and self.predicted(candidate) * _HOPELESS < self.rate

    def affordable(self, candidate: Candidate) -> bool:
        """True where a step of a setting is over soon enough to be run for certainty's sake."""
        return self.predicted_seconds(candidate) <= _PATIENCE_SECONDS

    def extra(self, candidate: Candidate) -> float:
        """Seconds that a setting computes twice."""
        return self.survey.extra(candidate.choice) * candidate.batch_size / self.survey.batch_size

    def predicted_seconds(self, candidate: Candidate) -> float:
        """A step, from the pace."""
        return self.pace.seconds(candidate.batch_size) + self.extra(candidate)

    def predicted(self, candidate: Candidate) -> float:
        """Rows a second, from the pace."""
        return candidate.batch_size / max(1e-9, self.predicted_seconds(candidate))

    def measure(self, candidate: Candidate) -> None:
        """Run a setting under the best limit for it, and learn the pace from it."""
        if candidate.measured is not None:
            return
        if len(self.points) > 1:
            candidate.foreseen = self.predicted(candidate)
        self.trials.measure(candidate)
        if candidate.measured is not None and not candidate.died:
            self.learn(candidate, candidate.measured.seconds)
            if candidate.fits:
                self.rate = max(self.rate, candidate.rows_per_second)

    def learn(self, candidate: Candidate, seconds: float) -> None:
        """Let a step's time count for the pace."""
        once = max(1e-9, seconds - self.extra(candidate))
        self.points[candidate.batch_size] = min(once, self.points.get(candidate.batch_size, once))
        *smaller, largest = sorted(self.points.items())
        # The larger of the sizes that are far enough from the largest for a slope.
        apart = [point for point in smaller if 2 * point[0] <= largest[0]] or smaller[:1]
        self.pace = pace_through([*apart[-1:], largest])

    def close(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those that are worth timing in turns: near the best rate, or what anybody would try."""
        best = self.rate
        # A machine that was busy for a moment may have kept a good one back.
        close = [c for c in candidates if c.known_as or c.rows_per_second >= _CLOSE * best]
        return sorted(close, key=lambda c: (not c.known_as, -c.rows_per_second))[:_MOST_RACERS]

    def learn_from(self, finished: list[Candidate]) -> None:
        """Take the pace from times in turns: they stand beside one another whatever the machine did meanwhile."""
        fastest = finished[0].standing
        if len(finished) < 2 or fastest is None:
            return
        self.rate, self.points = 1 / fastest.seconds, {}
        for candidate in finished:
            self.learn(candidate, candidate.batch_size * fastest.seconds * (1 + candidate.behind))

    def undecided(self, finished: list[Candidate]) -> bool:
        """True where much could be lost by taking one of several settings for as fast as the fastest."""
        standings = [c.standing for c in finished if c.standing is not None]
        return any(s.behind > 0 and s.behind + 2 * s.uncertainty > 2 * self.tolerance for s in standings)

    def last_resort(self) -> Candidate:
        """The smallest batch with every block checkpointed, where nothing that was run fits."""
        survey = self.survey
        smallest = self.add(self.sizes[0], survey.all)
        self.measure(smallest)
        if not smallest.fits:
            raise self.trials.nothing_fits(smallest)
        return smallest

    def settle(self, finished: list[Candidate], keep_usual: bool) -> Candidate:
        """Of the settings that are as fast as the fastest, the one with the lowest peak.

        Where the turns leave it open whether a setting that anybody would try is slower at all, it counts as fast.
        """

        def level(candidate: Candidate) -> bool:
            doubt = candidate.standing.uncertainty if candidate.standing and candidate.known_as else 0.0
            return candidate.behind - lead <= max(self.tolerance, min(doubt, 2 * self.tolerance))

        lead = min(c.behind for c in finished)
        if lead == math.inf:  # none of them was timed in turns
            return max(finished, key=lambda c: c.rows_per_second)
        equals = [c for c in finished if level(c)]
        if keep_usual:
            equals = [c for c in equals if c.batch_size >= USUAL_BATCH] or equals
        return min(equals, key=lambda c: (c.peak_bytes, c.batch_size))


def _count(survey: Survey, size: int) -> tuple[int, str]:
    with interruptible():
        return count_items(survey.make_batch(size), size)
