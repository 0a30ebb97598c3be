"""What a step could change besides its state: the containers that its code can reach.

A trace runs the step's Python once with placeholders for arrays. Anything of that which stays behind in a list, an
attribute or a global would break later code, so those places are noted before and put back after.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

# How far from the step to look, and at how many containers at most.
_DEPTH = 6
_MOST = 20_000


class Surroundings:
    """The mutable containers around a step, to be put back."""

    def __init__(self, step: Callable[..., Any], state: Any) -> None:
        self._saved: list[tuple[str, Any, Any]] = []
        self._seen: set[int] = set()
        self._state = {id(c) for c in _state_containers(state)}
        waiting: list[tuple[str, Any, int]] = list(_roots(step))
        while waiting and len(self._saved) < _MOST:
            path, thing, depth = waiting.pop(0)
            if id(thing) in self._seen:
                continue
            self._seen.add(id(thing))
            if depth < _DEPTH:
                waiting.extend((p, child, depth + 1) for p, child in self._look(path, thing))

    def restore(self) -> list[str]:
        """Put every container back; return the places where arrays were left behind."""
        left: list[str] = []
        for path, thing, before in self._saved:
            for place, value in _changes(path, thing, before):
                if _holds_array(value):
                    left.append(place)
            _put_back(thing, before)
        return left

    def _look(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        if id(thing) in self._state:
            return  # the snapshot of the state sees to it
        if isinstance(thing, types.CellType):
            self._saved.append((path, thing, _content(thing)))
            yield path, _content(thing)
        elif isinstance(thing, dict):
            self._saved.append((path, thing, dict(thing)))
            yield from ((f"{path}[{key!r}]", value) for key, value in list(thing.items()))
            yield from self._attributes(path, thing)
        elif isinstance(thing, list):
            self._saved.append((path, thing, list(thing)))
            yield from ((f"{path}[{i}]", value) for i, value in enumerate(thing))
        elif isinstance(thing, (tuple, set, frozenset)):
            if isinstance(thing, set):
                self._saved.append((path, thing, set(thing)))
            yield from ((path, value) for value in thing)
        elif isinstance(thing, (types.FunctionType, types.MethodType, functools.partial)):
            yield from ((p, child) for p, child, _ in _roots(thing))
        elif not isinstance(thing, (types.ModuleType, type, mx.array)) and not _is_standard(thing):
            yield from self._attributes(path, thing)

    def _attributes(self, path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        attributes = getattr(thing, "__dict__", None)
        if type(attributes) is dict:
            self._saved.append((f"{path}.", attributes, dict(attributes)))
            yield from ((f"{path}.{key}", value) for key, value in list(attributes.items()))


def _is_standard(thing: Any) -> bool:
    """Whether the standard library defines it: locks, loggers and files look after themselves."""
    return type(thing).__module__.partition(".")[0] in sys.stdlib_module_names


def _state_containers(state: Any) -> Iterator[Any]:
    from mlx.optimizers import Optimizer

    waiting, seen = [state], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, mx.array):
            continue
        seen.add(id(node))
        if isinstance(node, (dict, list, tuple, Optimizer)):
            yield node
        if isinstance(node, dict):
            waiting.extend(node.values())
        elif isinstance(node, (list, tuple)):
            waiting.extend(node)
        if isinstance(node, Optimizer) or (isinstance(node, dict) and hasattr(node, "__dict__")):
            yield vars(node)
            waiting.extend(vars(node).values())


def _roots(step: Any) -> Iterator[tuple[str, Any, int]]:
    """Where a function's code can put things: its closure, the globals it names, what it is bound to."""
    if isinstance(step, functools.partial):
        yield from _roots(step.func)
        yield "a bound argument", [step.args, step.keywords], 0
    elif isinstance(step, types.MethodType):
        yield "self", step.__self__, 0
        yield from _roots(step.__func__)
    elif isinstance(step, types.FunctionType) or hasattr(step, "__code__"):
        code = step.__code__
        for name, cell in zip(code.co_freevars, step.__closure__ or (), strict=False):
            yield name, cell, 0
        for name in code.co_names:
            if name in step.__globals__:
                yield name, step.__globals__[name], 0
    elif callable(step) and not isinstance(step, type):
        yield type(step).__name__, step, 0


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _changes(path: str, thing: Any, before: Any) -> Iterator[tuple[str, Any]]:
    """Places whose content is not what it was, with the new content."""
    if isinstance(thing, types.CellType):
        if _content(thing) is not before:
            yield path, _content(thing)
    elif isinstance(thing, dict):
        for key, value in thing.items():
            if key not in before or before[key] is not value:
                yield (f"{path}{key}" if path.endswith(".") else f"{path}[{key!r}]"), value
    elif isinstance(thing, list):
        for i, value in enumerate(thing):
            if i >= len(before) or before[i] is not value:
                yield f"{path}[{i}]", value
    elif isinstance(thing, set):
        for value in thing - before:
            yield path, value


def _put_back(thing: Any, before: Any) -> None:
    if isinstance(thing, types.CellType):
        if _content(thing) is not before:
            thing.cell_contents = before
    elif isinstance(thing, dict):
        if thing.keys() != before.keys() or any(thing[k] is not v for k, v in before.items()):
            dict.clear(thing)
            dict.update(thing, before)
    elif isinstance(thing, list):
        if len(thing) != len(before) or any(a is not b for a, b in zip(thing, before, strict=True)):
            thing[:] = before
    elif thing != before:
        thing.clear()
        thing.update(before)


def _holds_array(value: Any) -> bool:
    if isinstance(value, mx.array):
        return True
    if isinstance(value, dict):
        return any(_holds_array(v) for v in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(_holds_array(v) for v in value)
    return False
