"""What remains of a run for the gradient: nothing of a block's state, and everything of a log or a counter.

The second run starts from what every container held when the first one began. Afterwards containers that hold
arrays (running statistics, caches and the positions that go with them) get back what they held before the second
run, so that a cache is written once. Numbers, strings and logs of them are no state of a gradient: what the second
run did to them stays, as it does with a function that is called twice. `is_recomputing` tells the runs apart.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.places import ModuleAttributes, Place

_PLAIN = (int, float, complex, str, bytes, type(None))
_MISSING = object()


def take_back(place: Place, before: Any, started_from: Any) -> None:
    """Undo a second run in one place, but for what it counted and logged.

    Args:
        place: Where.
        before: What it held just before the second run.
        started_from: What the second run found in it.
    """
    now = place.get()
    if _same(now, started_from) or _is_state(place, before, now):
        place.put(before)
    elif isinstance(now, list):
        place.put(_carried_list(before, started_from, now))
    else:
        place.put(_carried(before, started_from, now))


def _is_state(place: Place, before: Any, now: Any) -> bool:
    return not isinstance(place, ModuleAttributes) and (_holds_arrays(before) or _holds_arrays(now))


def _same(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(map(is_, a.values(), b.values())) and a.keys() == b.keys()
    return all(map(is_, a, b))


def _holds_arrays(value: Any, depth: int = 4) -> bool:
    """Whether there are arrays in a value; a module's own do not count, it is no part of what holds it."""
    if isinstance(value, mx.array):
        return True
    if depth == 0 or isinstance(value, nn.Module):
        return False
    if isinstance(value, dict):
        return any(_holds_arrays(item, depth - 1) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_arrays(item, depth - 1) for item in value)
    return _holds_arrays(getattr(value, "__dict__", None), depth - 1)


def _carried_list(before: list[Any], start: list[Any], now: list[Any]) -> list[Any]:
    if len(now) == len(start) == len(before):
        return [_carried_item(*items) for items in zip(before, start, now, strict=True)]
    if len(now) > len(start) and _same(now[: len(start)], start):
        return before + now[len(start) :]
    return before


def _carried(before: dict[Any, Any], start: dict[Any, Any], now: dict[Any, Any]) -> dict[Any, Any]:
    kept = dict(before)
    for key, value in now.items():
        old = start.get(key, _MISSING)
        if value is old:
            continue
        item = _carried_item(before.get(key, _MISSING), old, value)
        if item is not _MISSING:
            kept[key] = item
    return kept


def _carried_item(before: Any, start: Any, now: Any) -> Any:
    if not isinstance(now, _PLAIN) or now is start:
        return before
    if all(isinstance(x, int | float) and not isinstance(x, bool) for x in (before, start, now)):
        return before + (now - start)
    # A counter that the second run saw for the first time, such as collections.Counter's.
    if start is _MISSING and isinstance(before, int) and isinstance(now, int) and not isinstance(now, bool):
        return before + now
    return now
