"""Progress: a bar for a terminal, plain lines for a file, both on standard error; and the log of every long command.

News of a command's work reaches the reader through here alone. The log `mlx_tune.progress` has it whether or not
progress is shown: commands and trials at INFO, layers and steps that are counted at DEBUG, what is odd at WARNING.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlx_tune.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_log = logging.getLogger(__name__)

#: A log hears something at least this often, however long a layer or a trial takes.
LONGEST_SILENCE = 10.0

#: Layers and steps that are counted may pass by the hundred: they are told at most this often.
SHORTEST_PAUSE = 1.0


class Bar:
    """Progress that is not shown: swallows what it is told."""

    def update(self, *, completed: float | None = None, total: float | None = None, text: str | None = None) -> None:
        """Move on.

        Args:
            completed: The amount that is done, in the unit of `total`.
            total: A new total, when it turned out otherwise than expected.
            text: The work that is going on now.
        """

    def advance(self, by: float = 1) -> None:
        """Count `by` more as done."""

    def say(self, text: str) -> None:
        """Show a line that stays: something odd, which the reader should know at once."""

    def ended(self, text: str) -> None:
        """Write to the log how a trial ended; on the screen the result's table will say so."""


class LiveBar(Bar):
    """One line of a terminal, drawn anew by rich."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        """Wrap rich's progress and the task in it."""
        self._progress = progress
        self._task = task

    def update(self, *, completed: float | None = None, total: float | None = None, text: str | None = None) -> None:
        """Move the line on."""
        fields = {} if text is None else {"text": text}
        self._progress.update(self._task, completed=completed, total=total, **fields)  # type: ignore[arg-type]

    def advance(self, by: float = 1) -> None:
        """Count `by` more as done."""
        self._progress.advance(self._task, by)

    def say(self, text: str) -> None:
        """Print above the line."""
        self._progress.console.print(text, markup=False, highlight=False)


class PlainBar(Bar):
    """Lines for a file or a pipe: one for each trial; what is counted at most every second, and at its end.

    Args:
        description: Begins each line.
        total: The value that counts as all of it; None where that is not known.
        write: Takes a line.
        clock: Seconds that only grow.

    Examples:
        >>> bar = PlainBar("counting", 2, print, clock=lambda: 0.0)
        >>> bar.advance()
        counting: 1 of 2
        >>> bar.advance()
        counting: 2 of 2
    """

    def __init__(
        self, description: str, total: float | None, write: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        """Begin at nothing done."""
        self._description, self._total, self._write, self._clock = description, total, write, clock
        self._done, self._text = 0.0, ""
        self._started = clock()
        self._told: float | None = None
        self._lock = threading.Lock()

    def update(self, *, completed: float | None = None, total: float | None = None, text: str | None = None) -> None:
        """Note what is going on, and write it when it is a trial or a second has passed."""
        with self._lock:
            news = text is not None and text != self._text
            counted = completed is not None and completed != self._done
            self._done = self._done if completed is None else completed
            self._total = self._total if total is None else total
            self._text = self._text if text is None else text
            if self._total is None:
                due = news
            else:
                due = (news or counted) and (self._silence() >= SHORTEST_PAUSE or self._done >= self._total)
            if due:
                self._tell()

    def advance(self, by: float = 1) -> None:
        """Count `by` more as done."""
        self.update(completed=self._done + by)

    def say(self, text: str) -> None:
        """Write a line of its own."""
        with self._lock:
            self._write(f"{self._description}: {text}")

    def tick(self) -> None:
        """Write again what is going on where nothing was written for `LONGEST_SILENCE`."""
        with self._lock:
            if self._clock() - (self._started if self._told is None else self._told) >= LONGEST_SILENCE:
                self._tell()

    def _silence(self) -> float:
        """Seconds since the last line; endless before the first."""
        return float("inf") if self._told is None else self._clock() - self._told

    def _tell(self) -> None:
        count = "" if self._total is None else f"{self._done:g} of {self._total:g}"
        words = ", ".join(part for part in (count, self._text) if part) or "working"
        self._told = self._clock()
        passed = self._told - self._started
        self._write(f"{self._description}: {words}" + (f" (after {format_seconds(passed)})" if passed >= 1 else ""))


class LoggedBar(Bar):
    """Progress that is written to the log as well, whether or not it is shown.

    Args:
        description: Begins each line.
        counted: True where there is a total, so that lines are many and matter little.
        shown: Where else it goes.
    """

    def __init__(self, description: str, counted: bool, shown: Bar) -> None:
        """Begin at nothing done."""
        self._description, self._shown = description, shown
        self._level = logging.DEBUG if counted else logging.INFO
        self._text, self._done = "", 0.0

    def update(self, *, completed: float | None = None, total: float | None = None, text: str | None = None) -> None:
        """Move on, and log what is going on where that is new."""
        if text is not None and text != self._text:
            self._text = text
            _log.log(self._level, "%s: %s", self._description, text)
        self._done = self._done if completed is None else completed
        self._shown.update(completed=completed, total=total, text=text)

    def advance(self, by: float = 1) -> None:
        """Count `by` more as done."""
        self._done += by
        _log.debug("%s: %g done", self._description, self._done)
        self._shown.advance(by)

    def say(self, text: str) -> None:
        """Show a line that stays, and log it as a warning."""
        _log.warning("%s: %s", self._description, text)
        self._shown.say(text)

    def ended(self, text: str) -> None:
        """Log how a trial ended."""
        _log.log(self._level, "%s: %s", self._description, text)


@contextmanager
def progress_bar(description: str, total: float | None = None, enabled: bool = True) -> Iterator[Bar]:
    """Show progress on standard error while the block runs, and log it.

    A terminal and a notebook get a bar. Anything else, such as a log file, gets plain lines: one for each trial, one a
    second at most for layers and steps, and one at least every ten seconds.

    Args:
        description: The name of the work, at the start of the line.
        total: The value that counts as all of it; None where that is not known.
        enabled: False shows nothing (and imports nothing); it is logged all the same.

    Yields:
        The line, to be moved on with `update` and `advance`.

    Examples:
        >>> with progress_bar("counting", total=3, enabled=False) as bar:
        ...     for i in range(3):
        ...         bar.advance()
    """
    started = time.monotonic()
    _log.info("%s: begun", description)
    try:
        with _shown(description, total, enabled) as bar:
            yield LoggedBar(description, total is not None, bar)
    except BaseException as error:
        passed = format_seconds(time.monotonic() - started)
        _log.info("%s: stopped by %s after %s", description, type(error).__name__, passed)
        raise
    _log.info("%s: ended after %s", description, format_seconds(time.monotonic() - started))


@contextmanager
def _shown(description: str, total: float | None, enabled: bool) -> Iterator[Bar]:
    """Show the progress as a terminal, a notebook or a file needs it."""
    if not enabled or sys.stderr is None:
        yield Bar()
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_interactive or console.is_jupyter:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=False) as progress:
            yield LiveBar(progress, progress.add_task(description, total=total, text=""))
        return
    bar, ended = PlainBar(description, total, _write_line, time.monotonic), threading.Event()
    beat = threading.Thread(target=keep_ticking, args=(bar, ended.wait), name="mlx_tune progress", daemon=True)
    beat.start()
    try:
        yield bar
    finally:
        ended.set()
        beat.join()


def keep_ticking(bar: PlainBar, wait: Callable[[float], bool]) -> None:
    """Let a bar write when its time has come, until it has ended.

    Args:
        bar: The bar.
        wait: Waits for so many seconds; True says that the bar has ended.
    """
    while not wait(SHORTEST_PAUSE):
        try:
            bar.tick()
        except (OSError, ValueError):  # whoever read is gone, which is no reason to stop working
            return


def _write_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
