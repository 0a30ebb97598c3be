"""What a block can reach: every array it may use, and every container it may write to.

A block's gradient must reach each array that the block used, wherever it took it from, and running the block a
second time must start from what the containers held the first time and leave no mark in them. So before a call
everything reachable is noted: arguments, attributes, items, closures, defaults, and the globals that the code
names. The walk knows arrays by identity; a tied weight is one array in two places.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.named import class_arrays, class_functions, global_names, is_foreign
from mlx_tune.places import (
    Attributes,
    Cell,
    Defaults,
    Items,
    ModuleAttributes,
    Names,
    PartialArguments,
    Place,
    Sequence,
    slot_names,
)

_MISSING = object()


class Ref:
    """Stands for an array in a note of what a container held."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class TupleOf:
    """Stands for a tuple that holds arrays, which has to be made anew to hold others."""

    __slots__ = ("items", "kind")

    def __init__(self, kind: type, items: list[Any]) -> None:
        self.kind = kind
        self.items = items


def filled(template: Any, arrays: list[mx.array]) -> Any:
    """A value with the arrays that its template stands for."""
    if type(template) is Ref:
        return arrays[template.index]
    if type(template) is TupleOf:
        items = [filled(item, arrays) for item in template.items]
        if template.kind is tuple:
            return tuple(items)
        if hasattr(template.kind, "_make"):
            return template.kind._make(items)
        return template.kind(items)
    return template


class Note:
    """What one place held: its items, those with arrays replaced by templates.

    Attributes:
        place: Where.
        items: What it held.
        templates: The keys of `items` that are templates.
    """

    __slots__ = ("items", "place", "templates")

    def __init__(self, place: Place, items: Any, templates: list[Any]) -> None:
        self.place = place
        self.items = items
        self.templates = templates

    def filled(self, arrays: list[mx.array]) -> Any:
        """The items with these arrays in them."""
        if not self.templates:
            return self.items
        items = self.items.copy()
        for key in self.templates:
            items[key] = filled(items[key], arrays)
        return items


class Walk:
    """Walks values and notes arrays and containers, each once, in an order that only depends on the values.

    Args:
        known: Identities of containers not to enter, such as those of an earlier walk.
        wanted: Which arrays to note; others are left where they are.

    Attributes:
        arrays: The arrays found.
        notes: The containers found, with what they held.
        before: For each of `notes`, its items themselves. Holds arrays: drop it when it is no longer needed.
        seen: Everything entered, by identity, known ones included.
    """

    def __init__(self, known: Iterable[int] = (), wanted: Callable[[mx.array], bool] | None = None) -> None:
        self.arrays: list[mx.array] = []
        self.notes: list[Note] = []
        self.before: list[Any] = []
        self.seen: set[int] = set(known)
        self._wanted = wanted
        self._index: dict[int, int] = {}
        self._queue: deque[tuple[Place, Any]] = deque()

    def add(self, value: Any) -> Any:
        """Note a value and everything below it; returns what stands for it."""
        template = self._encode(value)
        queue = self._queue
        while queue:
            self._enter(*queue.popleft())
        return template

    def _enter(self, place: Place, items: Any) -> None:
        noted = items
        templates: list[Any] = []
        for key, value in items.items() if isinstance(items, dict) else enumerate(items):
            handler = _KINDS.get(type(value))
            if handler is _leave:
                continue
            template = self._encode(value) if handler is None else handler(self, value)
            if template is not value:
                if not templates:
                    noted = items.copy()
                noted[key] = template
                templates.append(key)
        self.notes.append(Note(place, noted, templates))
        self.before.append(items)

    def _encode(self, value: Any) -> Any:
        kind = type(value)
        handler = _KINDS.get(kind)
        if handler is None:
            handler = _KINDS[kind] = _handler(kind)
        return handler(self, value)

    def _visit(self, value: Any) -> bool:
        """Whether this is the first time."""
        if id(value) in self.seen:
            return False
        self.seen.add(id(value))
        return True

    def _push(self, place: Place) -> None:
        self._queue.append((place, place.get()))


def _leave(walk: Walk, value: Any) -> Any:
    return value


def _array(walk: Walk, value: mx.array) -> Any:
    if walk._wanted is not None and not walk._wanted(value):
        return value
    index = walk._index.get(id(value))
    if index is None:
        index = walk._index[id(value)] = len(walk.arrays)
        walk.arrays.append(value)
    return Ref(index)


def _tuple(walk: Walk, value: tuple[Any, ...]) -> Any:
    items = [walk._encode(item) for item in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    return TupleOf(type(value), items)


def _set(walk: Walk, value: Any) -> Any:
    # Arrays in a set cannot be replaced (the set is ordered by their hash); what else is in it can be entered.
    if walk._visit(value):
        for item in value:
            if not isinstance(item, mx.array):
                walk._encode(item)
    return value


def _list(walk: Walk, value: Any) -> Any:
    if walk._visit(value):
        walk._push(Sequence(value))
        _own(walk, value)
    return value


def _dict(walk: Walk, value: Any) -> Any:
    if walk._visit(value):
        walk._push(Items(value))
        _own(walk, value)
    return value


def _object(walk: Walk, value: Any) -> Any:
    if walk._visit(value):
        _own(walk, value)
    return value


def _own(walk: Walk, value: Any) -> None:
    """Attributes of an object, and what its class's code names."""
    kind = type(value)
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict and attributes:
        if not isinstance(value, nn.Module):
            walk._push(Items(attributes))
        elif not (is_foreign(kind.__module__) and _is_plain(attributes)):
            # MLX's own layers do not change their numbers and flags when they are called.
            walk._push(ModuleAttributes(attributes))
    names = slot_names(kind)
    if names:
        walk._push(Attributes(value, names))
    for function in class_functions(kind):
        _function(walk, function)
    for base, arrays in class_arrays(kind):
        if walk._visit(base):
            walk._push(Attributes(base, arrays))


def _is_plain(attributes: dict[str, Any]) -> bool:
    """Whether there is nothing in them to enter."""
    return all(_KINDS.get(type(value)) is _leave or (not value and type(value) is set) for value in attributes.values())


def _method(walk: Walk, value: MethodType) -> Any:
    walk._encode(value.__self__)
    walk._encode(value.__func__)
    return value


def _partial(walk: Walk, value: Any) -> Any:
    # A partial's arguments are read-only, but __setstate__ replaces them.
    if walk._visit(value):
        walk._push(PartialArguments(value))
    return value


def _transformed(walk: Walk, value: Any) -> Any:
    # mx.compile, mx.checkpoint, mx.grad and the like hold the function they wrap, and compile the state it was given
    # as inputs=, where only the garbage collector sees them.
    if walk._visit(value):
        for held in gc.get_referents(value):
            walk._encode(held)
    return value


def _function(walk: Walk, value: FunctionType) -> Any:
    if not walk._visit(value):
        return value
    if is_foreign(value.__module__):
        # A library's function holds what the caller gave it in its closure (functools.wraps, nn.value_and_grad).
        if value.__closure__:
            for cell in value.__closure__:
                _cell(walk, cell)
        return value
    if value.__closure__:
        for cell in value.__closure__:
            _cell(walk, cell)
    if value.__defaults__ and any(_KINDS.get(type(default)) is not _leave for default in value.__defaults__):
        walk._push(Defaults(value))
    if value.__kwdefaults__:
        walk._encode(value.__kwdefaults__)
    if value.__dict__:
        walk._encode(value.__dict__)
    scope = value.__globals__
    named = []
    for name in global_names(value.__code__, scope):
        held = scope.get(name, _MISSING)
        if held is _MISSING:
            continue
        handler = _KINDS.get(type(held))
        if handler is _leave:
            continue
        if handler is _function or handler is _transformed:
            handler(walk, held)
        else:
            named.append(name)
    if named:
        walk._push(Names(scope, tuple(named)))
    return value


def _cell(walk: Walk, cell: Any) -> None:
    if walk._visit(cell):
        walk._push(Cell(cell))


_TRANSFORMED = {type(mx.compile(abs)), type(mx.checkpoint(abs)), type(mx.custom_function(abs))}

_KINDS: dict[type, Callable[[Walk, Any], Any]] = {
    mx.array: _array,
    tuple: _tuple,
    list: _list,
    dict: _dict,
    set: _set,
    frozenset: _set,
    deque: _list,
    FunctionType: _function,
    MethodType: _method,
    partial: _partial,
    SimpleNamespace: _object,
}


def _handler(kind: type) -> Callable[[Walk, Any], Any]:
    """How to walk instances of a class."""
    if issubclass(kind, type):
        return _leave
    for base, handler in ((tuple, _tuple), (dict, _dict), (list, _list), (deque, _list), (set, _set)):
        if issubclass(kind, base):
            return handler
    if kind in _TRANSFORMED:
        return _transformed
    root, _, below = kind.__module__.partition(".")
    if is_foreign(root) and (root != "mlx" or below.partition(".")[0] == "core"):
        return _leave
    return _object if kind.__dictoffset__ or slot_names(kind) else _leave
