"""The findings of a search on disk, so that one that was interrupted goes on instead of starting again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from mlx_tune.batching import journal_lines
from mlx_tune.batching.result import Trial
from mlx_tune.errors import DiskError, InvalidArgumentError
from mlx_tune.files.durable_lines import append_line
from mlx_tune.memory import MemoryBudget
from mlx_tune.units import format_bytes

_ELSEWHERE = "Name a journal on another disk; a copy of this one goes on from what it holds."


class Runner(Protocol):
    """Whatever measures a batch size."""

    def trial(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """One trial for each memory limit that was needed; the last decides."""
        ...


class Journal:
    """A runner that writes down each trial before and after, and answers from the file what it knows.

    A trial that was begun and neither ended nor failed took its process or its machine down: it counts as not fitting.
    One in a process of its own that had to end because the process of the search was killed proved nothing.

    Args:
        path: The file; made where there is none. A last line that was torn off in the middle is taken out.
        asked: The limit that this search was given; None where that was left to the machine, or a share of it.
        resolved: The same in bytes. Where a file exists and nothing was asked, the file's budget counts.

    Raises:
        InvalidArgumentError: The file cannot be used (it belongs to a search under another budget, is no journal, or
            is damaged), and was left as it is; the text says which line is wrong, and what to do.
        DiskError: The disk has no room for a line more.
    """

    def __init__(self, path: str | os.PathLike[str], *, asked: object, resolved: MemoryBudget) -> None:
        """Read the file where there is one, else start it."""
        self.path = Path(path)
        self.budget = resolved
        self.runner: Runner | None = None
        self._known: dict[int, list[Trial]] = {}
        try:
            self._read(asked)
        except DiskError:
            raise
        except OSError as error:
            raise InvalidArgumentError(
                f"{self._name} cannot be read and written: {error}. Name a file in a folder that can be written to."
            ) from error

    def trial(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """Answer from the file, or measure and write it down."""
        known = self.recall(size, steps)
        return known if known is not None else self.measure(size, predicted_bytes, steps)

    def recall(self, size: int, steps: int) -> list[Trial] | None:
        """The file's record of a size after so many steps, or None."""
        known = self._known.get(size)
        return known if known is not None and (known[-1].steps >= steps or not known[-1].fits) else None

    def measure(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """Measure, whatever the file knows, and write it down."""
        assert self.runner is not None
        self._write(journal_lines.started(size))
        try:
            trials = self.runner.trial(size, predicted_bytes, steps)
        except BaseException as error:
            try:
                self._write(journal_lines.interrupted(size))  # the process lives: the trial proved nothing
            except DiskError as full:
                error.add_note(str(full))
            raise
        self._known[size] = trials
        self._write(journal_lines.ended(size, trials))
        return trials

    def _write(self, line: str) -> None:
        append_line(self.path, line, self._name, _ELSEWHERE)

    def _read(self, asked: object) -> None:
        """Go on from what the file holds, if it is about the same budget; mend its end, or start it."""
        with self.path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            found = journal_lines.read_records(content, self._name)
            if found is not None and asked is not None and int(self.budget) != found.budget_bytes:
                raise InvalidArgumentError(
                    f"{self._name} was written under a budget of {format_bytes(found.budget_bytes)}, this search has "
                    f"{format_bytes(int(self.budget))}: give the same budget, or delete the file."
                )
            file.truncate(0 if found is None else len(content) - found.torn_bytes)
        if found is None:
            self._write(journal_lines.header_line(int(self.budget), self.budget.source))
            return
        if found.lacks_newline:
            self._write("\n")
        self.budget = MemoryBudget(found.budget_bytes, f"from the journal, {found.source}")
        self._known = found.trials
        reason = "an earlier search did not survive this trial"
        for size in found.open_sizes:
            self._known[size] = [Trial(size, None, limit_bytes=found.budget_bytes, reason=reason)]

    @property
    def _name(self) -> str:
        return f"journal={str(self.path)!r}"
