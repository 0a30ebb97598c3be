"""What a search has found out, on disk, so that one that was interrupted goes on instead of starting again."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

from mlx_tune.batching.result import Trial
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.memory import MemoryBudget
from mlx_tune.units import format_bytes

_FORMAT = 1


class Runner(Protocol):
    """Whatever measures a batch size."""

    def trial(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """One trial for each memory limit that was needed; the last decides."""
        ...


class Journal:
    """A runner that writes down each trial before and after, and answers from the file what it knows.

    A trial that was begun and neither ended nor failed took its process or its machine down: it counts as not fitting.

    Args:
        path: The file; made where there is none.
        asked: What this search was asked to stay within; None where that was left to the machine, or a share of it.
        resolved: The same in bytes. Where a file exists and nothing was asked, the file's budget counts.

    Raises:
        InvalidArgumentError: The file belongs to a search under another budget, or is no journal.
    """

    def __init__(self, path: str | os.PathLike[str], *, asked: object, resolved: MemoryBudget) -> None:
        """Read the file where there is one, else start it."""
        self.path = Path(path)
        self.budget = resolved
        self.runner: Runner | None = None
        self._known: dict[int, list[Trial]] = {}
        if self.path.exists() and self.path.stat().st_size > 0:
            self._read(asked)
        else:
            self._write({"mlx_tune_autobatch": _FORMAT, "budget_bytes": int(resolved), "source": resolved.source})

    def trial(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """Answer from the file, or measure and write it down."""
        known = self.recall(size, steps)
        return known if known is not None else self.measure(size, predicted_bytes, steps)

    def recall(self, size: int, steps: int) -> list[Trial] | None:
        """What the file knows of a size after so many steps, or None."""
        known = self._known.get(size)
        return known if known is not None and (known[-1].steps >= steps or not known[-1].fits) else None

    def measure(self, size: int, predicted_bytes: int | None, steps: int) -> list[Trial]:
        """Measure, whatever the file knows, and write it down."""
        assert self.runner is not None
        self._write({"started": size})
        try:
            trials = self.runner.trial(size, predicted_bytes, steps)
        except BaseException:
            self._write({"interrupted": size})  # the process lives: the trial proved nothing
            raise
        self._known[size] = trials
        self._write({"ended": size, "trials": [trial.to_dict() for trial in trials]})
        return trials

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the next trial may take the machine down

    def _read(self, asked: object) -> None:
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the line that was being written when the machine went down
        if not records or records[0].get("mlx_tune_autobatch") != _FORMAT:
            raise InvalidArgumentError(
                f"journal={str(self.path)!r} exists and is no journal of autobatch: name another file."
            )
        recorded = int(records[0]["budget_bytes"])
        if asked is not None and int(self.budget) != recorded:
            raise InvalidArgumentError(
                f"journal={str(self.path)!r} was written under a budget of {format_bytes(recorded)}, this search has "
                f"{format_bytes(int(self.budget))}: give the same budget, or delete the file."
            )
        self.budget = MemoryBudget(recorded, f"from the journal, {records[0].get('source', 'given')}")
        names = {field.name for field in fields(Trial)}
        open_size: int | None = None
        for record in records[1:]:
            open_size = record.get("started")
            if "ended" in record:
                self._known[record["ended"]] = [
                    Trial(**{name: value for name, value in trial.items() if name in names})
                    for trial in record["trials"]
                ]
        if open_size is not None:
            reason = "an earlier search did not survive this trial"
            self._known[open_size] = [Trial(open_size, None, limit_bytes=recorded, reason=reason)]
