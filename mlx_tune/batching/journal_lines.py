"""The lines of a journal: how they are written, and how they are read from a file that may hold anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeGuard

from mlx_tune.batching.result import Trial
from mlx_tune.errors import InvalidArgumentError

_FORMAT = 1
#: How every journal begins.
_BEGINNING = f'{{"mlx_tune_autobatch": {_FORMAT}, "budget_bytes": '.encode()
#: No number of bytes, rows or tokens is larger.
_LARGEST = 1 << 63


@dataclass
class Records:
    """The records of a journal.

    Attributes:
        budget_bytes: The budget of its search.
        source: Where that came from.
        torn_bytes: The bytes at the file's end that are a line not written to its end.
        lacks_newline: True where only the newline is missing.
        trials: Measurements, by size.
        open_sizes: Sizes whose trials were begun and neither ended nor were interrupted.
    """

    budget_bytes: int
    source: str
    torn_bytes: int = 0
    lacks_newline: bool = False
    trials: dict[int, list[Trial]] = field(default_factory=dict)
    open_sizes: set[int] = field(default_factory=set)


def header_line(budget_bytes: int, source: str) -> str:
    """The first line of a journal."""
    return _line({"mlx_tune_autobatch": _FORMAT, "budget_bytes": budget_bytes, "source": source})


def started(size: int) -> str:
    """The line before a trial."""
    return _line({"started": size})


def interrupted(size: int) -> str:
    """The line after a trial that proved nothing."""
    return _line({"interrupted": size})


def ended(size: int, trials: list[Trial]) -> str:
    """The line after a trial."""
    return _line({"ended": size, "trials": [trial.to_dict() for trial in trials]})


def _line(record: dict[str, object]) -> str:
    return json.dumps(record) + "\n"


def read_records(content: bytes, name: str) -> Records | None:
    """Read a journal.

    Each line is written at once, its newline last. So the end of the file may be a line that was torn off, where the
    machine went down in the middle of writing it; nothing else may be out of order.

    Args:
        content: The file.
        name: Its name in errors.

    Returns:
        The contents; None where it holds nothing yet, not even all of its first line.

    Raises:
        InvalidArgumentError: It is no journal, or a line is not what it should be; the text says which.

    Examples:
        >>> content = header_line(1000, "given") + started(4) + '{"ended": 4, "tri'
        >>> read_records(content.encode(), "search.jsonl")
        Records(budget_bytes=1000, source='given', torn_bytes=17, lacks_newline=False, trials={}, open_sizes={4})
    """
    *lines, end = content.split(b"\n")
    complete = _parse(end) is not None
    if complete:
        lines.append(end)
    elif not content.strip() or (not lines and (_BEGINNING.startswith(end) or end.startswith(_BEGINNING))):
        return None
    elif end.strip(b"\0")[:1] not in (b"", b"{"):  # a file system may leave zeros where it did not come to write
        lines.append(end)
    records = _first(_parse(lines[0]) if lines else None, name)
    records.lacks_newline, records.torn_bytes = complete, 0 if complete else len(end)
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            try:
                _take(records, _parse(line))
            except ValueError as error:
                raise InvalidArgumentError(
                    f"{name}, line {number}: {error}. The file was left as it is: name another one, or take that line "
                    f"out, and what it knew is measured again."
                ) from None
    return records


def _parse(line: bytes) -> dict[str, object] | None:
    """The object on a line, or None."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _first(record: dict[str, object] | None, name: str) -> Records:
    """The contents of the first line."""
    version = None if record is None else record.get("mlx_tune_autobatch")
    if record is None or not _whole(version):
        wrong = "it exists and is no journal of autobatch"
    elif version != _FORMAT:
        wrong = f"another version of mlx_tune wrote it, in format {version} where this one reads {_FORMAT}"
    else:
        budget, source = record.get("budget_bytes"), record.get("source", "given")
        if _whole(budget) and budget > 0 and isinstance(source, str):
            return Records(budget, source)
        wrong = f"budget_bytes={budget!r} from source={source!r} is no budget"
    raise InvalidArgumentError(f"{name}, line 1: {wrong}. It was left as it is: name another file.")


def _take(records: Records, record: dict[str, object] | None) -> None:
    """Add what one line says.

    Raises:
        ValueError: It is no line of a journal.
    """
    kinds = [] if record is None else [kind for kind in ("started", "interrupted", "ended") if kind in record]
    if record is None or len(kinds) != 1:
        raise ValueError("it is none of the objects that a journal holds (started, interrupted, ended)")
    kind = kinds[0]
    size = record[kind]
    if not _whole(size) or size == 0:
        raise ValueError(f"{kind}={size!r} is no batch size")
    if kind == "ended":
        records.trials[size] = _trials(size, record.get("trials"))
    if kind == "started":
        records.open_sizes.add(size)
    else:
        records.open_sizes.discard(size)


def _trials(size: int, values: object) -> list[Trial]:
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise ValueError(f"batch size {size} ended without trials")
    return [_trial(size, value) for value in values]


def _trial(size: int, value: dict[str, Any]) -> Trial:
    known = {}
    for attribute in fields(Trial):
        if attribute.name not in value:
            raise ValueError(f"a trial of batch size {size} has no {attribute.name}")
        given = known[attribute.name] = value[attribute.name]
        kind, _, optional = str(attribute.type).partition(" | ")
        if not _KINDS[kind](given) and not (given is None and optional):
            raise ValueError(f"a trial of batch size {size} has {attribute.name}={given!r}, which is no such value")
    trial = Trial(**known)
    if trial.batch_size != size or (trial.fits and trial.peak_bytes is None):
        raise ValueError(f"a trial of batch size {size} is of batch size {trial.batch_size}, or fits without a peak")
    return trial


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


#: What a trial's attributes may be, by their types in `Trial`.
_KINDS: dict[str, Callable[[object], bool]] = {
    "int": _whole,
    "float": lambda value: _whole(value) or (isinstance(value, float) and math.isfinite(value) and value >= 0),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
}
