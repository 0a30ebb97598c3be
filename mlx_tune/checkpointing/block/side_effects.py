"""The remains of a run for the gradient: nothing of a block's state, and everything of a log or a counter.

The second run starts from what every container held when the first one began. Afterwards containers that hold
arrays (running statistics, caches and the positions that go with them) get back what they held before the second
run, so that a cache is written once. Numbers, strings and logs of them are no state of a gradient: what the second
run did to them stays, as it does with a function that is called twice. `is_recomputing` tells the runs apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.reach.container_notes import Note
from mlx_tune.reach.places import Held, Members, ModuleAttributes, SelectedItems, same_items

_PLAIN = (int, float, complex, str, bytes, type(None))
_MISSING = object()


class Rewound:
    """Every place as it was when a block first ran, with other arrays; afterwards as it was before, but for logs.

    Args:
        notes: The places.
        arrays: The stand-ins in them for the arrays of the first run.

    Attributes:
        started: The contents of the places at first.
        changed: The indices of those that may hold something else by now.
    """

    def __init__(self, notes: list[Note], arrays: list[mx.array]) -> None:
        self._notes = notes
        self.started = [note.filled(arrays) for note in notes]
        self.changed: Collection[int] = range(len(notes))
        # What has not changed since the first run needs neither a copy nor putting back.
        self._before = [
            note.items if not note.marks and note.place.same(note.items) else note.place.get() for note in notes
        ]

    def __enter__(self) -> Rewound:
        """Put everything there."""
        try:
            for note, before, start in zip(self._notes, self._before, self.started, strict=True):
                if start is not before:
                    note.place.put(start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Put everything back."""
        for i, (note, before, start) in enumerate(zip(self._notes, self._before, self.started, strict=True)):
            if i in self.changed:
                note.place.put(_left_over(note.place, before, start))
            elif before is not start:
                note.place.put(before)


def _left_over(place: Held, before: Any, started_from: Any) -> object:
    """The contents of a place after a second run: those before it, with what that run counted and logged.

    Args:
        place: Where.
        before: The contents just before the second run.
        started_from: The contents that the second run found.
    """
    if place.same(started_from):
        return before
    now = place.get()
    # A cache and its position go together. Names of a module, a class or a program do not.
    apart = isinstance(place, ModuleAttributes | SelectedItems) or isinstance(place.held, type)
    if not apart and (_holds_arrays(before) or _holds_arrays(now)):
        return before
    if isinstance(place, Members):
        return list({*before, *(set(now) - set(started_from))})
    if isinstance(now, list):
        return _carried_list(before, started_from, now)
    return _carried(before, started_from, now)


def _holds_arrays(value: object, depth: int = 4) -> bool:
    """True where there are arrays in a value; a module's own do not count, it is no part of what holds it."""
    if isinstance(value, mx.array):
        return True
    if depth == 0 or isinstance(value, nn.Module):
        return False
    if isinstance(value, dict):
        return any(_holds_arrays(item, depth - 1) for item in value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return any(_holds_arrays(item, depth - 1) for item in value)
    return _holds_arrays(getattr(value, "__dict__", None), depth - 1)


def _carried_list(before: list[object], start: list[object], now: list[object]) -> list[object]:
    if len(now) == len(start) == len(before):
        return [_carried_item(*items) for items in zip(before, start, now, strict=True)]
    if len(now) > len(start) and same_items(now[: len(start)], start):
        return before + now[len(start) :]
    return before


def _carried(
    before: dict[object, object], start: dict[object, object], now: dict[object, object]
) -> dict[object, object]:
    kept = dict(before)
    for key, value in now.items():
        old = start.get(key, _MISSING)
        if value is old:
            continue
        item = _carried_item(before.get(key, _MISSING), old, value)
        if item is not _MISSING:
            kept[key] = item
    return kept


def _carried_item(before: object, start: Any, now: object) -> object:
    if now is start:
        return before
    if not isinstance(now, _PLAIN):
        # A log that only this run began is kept; an object that it made where there was one already is not.
        return now if before is _MISSING and start is _MISSING and not _holds_arrays(now) else before
    if all(isinstance(x, int | float) and not isinstance(x, bool) for x in (before, start, now)):
        return before + (now - start)
    # A counter that the second run saw for the first time, such as collections.Counter's.
    if start is _MISSING and isinstance(before, int) and isinstance(now, int) and not isinstance(now, bool):
        return before + now
    return now
