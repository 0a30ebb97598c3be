"""The one walk of the Python that a step or a block can reach: every array it may use, every place it may write to.

A block's gradient must reach each array that the block used, wherever it took it from, and running the block a
second time must start from what the places held the first time and leave no mark in them. A trace must put back
everything that the step wrote. So before a call everything reachable is noted: arguments, attributes, items,
closures, defaults, classes, and the globals and modules that the code names. The walk knows arrays by identity; a
tied weight is one array in two places.

What is entered: everything but the code and the objects of foreign libraries (`reach.facts`). Foreign functions are
followed to what they were given (`functools.wraps`, `nn.value_and_grad`), MLX's modules and optimizers and Python's
containers to what they hold. A module is followed to those of its names that the code in reach reads or assigns of
anything.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from threading import local
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import CallableProxyType, ProxyType, ref

import mlx.core as mx

from mlx_tune.reach.code_facts import OPEN, CodeNames, Facts, facts_of, is_foreign, referent
from mlx_tune.reach.container_notes import Note, Path, Ref, Remade
from mlx_tune.reach.following import follow_class, follow_function, follow_names
from mlx_tune.reach.places import (
    PLAIN,
    Attributes,
    ContextValue,
    Held,
    Items,
    Members,
    ModuleAttributes,
    PartialArguments,
    Sequence,
)
from mlx_tune.upstream import FROZEN, TRANSFORMED, referents


class Walk:
    """Arrays and places found from values, each noted once, in an order that depends on the values alone.

    Args:
        known: Containers not to enter, by identity: what an earlier walk has `seen`.
        wanted: Which arrays to note; others are left where they are.
        made: Walk what code has made: only what values hold counts, and not what their code and their classes name.
        room: The most items to note, the nearest first; a place with more is passed over. Any by default.

    Attributes:
        arrays: The arrays found, of any shape and dtype, each once.
        paths: Where each was found first.
        notes: The places found, with what they held. They hold arrays until they are told to forget them.
        seen: Everything entered, by identity, which holds on to it so that nothing else can have that identity.
        iterators: Iterators found that only run once, with where.
        generators: Random generators of Python and NumPy, with where.
        room: The number of items, members of containers, that may still be noted.
        made: True where what code names does not count.
        path: Where the value is that is looked at.
        home: The module of the class or function that holds it.
        code: The names in each function that was followed.
        holders: Modules and classes, with where: they are followed to what the code asks of anything.
        noted: The names noted of classes and modules, by the identity of what holds them.
        asked: The numbers of functions and holders that were followed so far.
    """

    def __init__(
        self,
        known: Mapping[int, object] | None = None,
        wanted: Callable[[mx.array], bool] | None = None,
        made: bool = False,
        room: int = sys.maxsize,
    ) -> None:
        self.arrays: list[mx.array] = []
        self.paths: list[Path | None] = []
        self.notes: list[Note] = []
        self.seen: dict[int, object] = {}
        self.iterators: list[tuple[object, Path | None]] = []
        self.generators: list[tuple[object, Path | None]] = []
        self.room = room
        self._known = known or {}
        self._wanted = wanted
        self.made = made
        self._index: dict[int, int] = {}
        self._functions: list[tuple[FunctionType, Path | None]] = []
        self._entered = 0
        self.path: Path | None = None
        self.home: str | None = None
        self.code: list[CodeNames] = []
        self.holders: list[tuple[Any, Path | None]] = []
        self.noted: dict[int, set[str]] = {}
        self.asked = (0, 0)

    def add(self, value: object, path: Path | None = None) -> Any:
        """Note a value and everything below it.

        Args:
            value: An array of any shape, a container, a function, a class or another object.
            path: The way to it from the top, link by link; None where it is the top.

        Returns:
            A `Ref` for an array, a `Remade` for a tuple or frozen set that holds some, else the value itself.
        """
        self.path = path
        template = self.look(value)
        self._finish()
        return template

    def add_code_of(self, values: Iterable[object]) -> None:
        """Follow what the code of functions names, and of the classes of objects, without entering those themselves."""
        for value in values:
            if isinstance(value, FunctionType):
                self._functions.append((value, None))
            for base in facts_of(type(value)).own:
                follow_class(self, base())
        self._finish()

    def _finish(self) -> None:
        notes, functions = self.notes, self._functions
        while True:
            if functions:
                follow_function(self, *functions.pop())
            elif self._entered < len(notes):
                self._enter(notes[self._entered])
                self._entered += 1
            elif not self.holders or not follow_names(self):
                return

    def look(self, value: object) -> Any:
        """The stand-in for a value: a template, or the value itself."""
        kind = type(value)
        if kind in PLAIN:
            return value
        mark = (_HANDLERS.get(kind) or _handler(kind))(self, value)
        return value if mark is None else mark

    def _enter(self, note: Note) -> None:
        items, marks, path, form = note.items, note.marks, note.path, note.form
        self.home = note.home
        if len(items) > 16 and PLAIN.issuperset(map(type, items.values() if type(items) is dict else items)):
            return  # tokens and vocabularies can be long
        for key, value in items.items() if type(items) is dict else enumerate(items):
            kind = type(value)
            if kind in PLAIN:
                continue
            self.path = (path, form, key)
            mark = (_HANDLERS.get(kind) or _handlers.get(id(kind)) or _handler(kind))(self, value)
            if mark is not None:
                marks[key] = mark

    def push(self, place: Held, form: str) -> None:
        """Note a place, to be entered later; `form` is how its keys are written."""
        note = Note(place, self.path, form, self.home)
        size = len(note.items)
        if size < self.room:
            self.room -= 1 + size
            self.notes.append(note)

    def visit(self, value: object) -> bool:
        """True the first time."""
        seen, identity = self.seen, id(value)
        if identity in seen or identity in self._known:
            return False
        seen[identity] = value
        return True


# Handlers: each notes a value, and returns a template where one has to stand for it.


def _leave(walk: Walk, value: object) -> None:
    """Leave the value alone: it has no parts to enter."""


def _array(walk: Walk, value: mx.array) -> Ref | None:
    if walk._wanted is not None and not walk._wanted(value):
        return None
    index = walk._index.get(id(value))
    if index is None:
        index = walk._index[id(value)] = len(walk.arrays)
        walk.arrays.append(value)
        walk.paths.append(walk.path)
    return Ref(index)


def _tuple(walk: Walk, value: Any) -> Remade | None:
    path, items = walk.path, []
    form = "[{!r}]" if isinstance(value, tuple) else ""
    for i, item in enumerate(value):
        walk.path = (path, form, i)
        items.append(walk.look(item))
    if all(new is old for new, old in zip(items, value, strict=True)):
        return None
    return Remade(type(value), items, getattr(value, "__dict__", None))


def _set(walk: Walk, value: set[object]) -> None:
    if walk.visit(value):
        walk.push(Members(value), "")


def _list(walk: Walk, value: object) -> None:
    if walk.visit(value):
        walk.push(Sequence(value), "[{!r}]")
        if type(value) is not list:
            _own(walk, value)


def _dict(walk: Walk, value: Any) -> None:
    if walk.visit(value):
        walk.push(Items(value), "[{!r}]")


def _dict_like(walk: Walk, value: Any) -> None:
    """A dictionary of a class of its own: a module, or what a model returns."""
    if walk.visit(value):
        walk.push(Items(value), ".{}" if facts_of(type(value)).is_module else "[{!r}]")
        _own(walk, value)


def _object(walk: Walk, value: object) -> None:
    if walk.visit(value):
        _own(walk, value)


def _own(walk: Walk, value: object) -> None:
    """Attributes of an object, and what its class's code names."""
    kind = type(value)
    facts, home = facts_of(kind), walk.home
    walk.home = facts.home or home
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict and walk.visit(attributes):
        if not facts.is_module:
            walk.push(Items(attributes), ".{}")
        elif not (facts.foreign and _is_plain(attributes)):
            # MLX's own layers do not change their numbers and flags when they are called.
            walk.push(ModuleAttributes(attributes), ".{}")
            walk.visit(attributes.get(FROZEN))  # names of parameters, which a call has no part in
    if facts.slots:
        walk.push(Attributes(value, facts.slots), ".{}")
    if facts.own and not walk.made and walk.visit(facts):
        for base in facts.own:
            follow_class(walk, base())
    walk.home = home


def _is_plain(attributes: dict[str, object]) -> bool:
    """True where there is nothing in them to enter."""
    return all(type(value) in PLAIN or (not value and type(value) is set) for value in attributes.values())


def _class(walk: Walk, value: type) -> None:
    """A class that a block names or holds: it may read its attributes, or make an object of it."""
    if not walk.made and walk.visit(value):
        path = walk.path
        for base in facts_of(value).own:
            follow_class(walk, base(), making=True)
        if not facts_of(value).foreign:
            walk.holders.append((value, path))
        if type(value) is not type:
            _own(walk, value)


def _method(walk: Walk, value: MethodType) -> None:
    walk.path = (None, "{}", "self")
    walk.look(value.__self__)
    walk.path = (None, "{}", getattr(value, "__name__", "method"))
    walk.look(value.__func__)


def _builtin(walk: Walk, value: BuiltinMethodType) -> None:
    walk.look(value.__self__)  # such as the list of its append


def _partial(walk: Walk, value: object) -> None:
    # A partial's arguments are read-only, but __setstate__ replaces them.
    if walk.visit(value):
        walk.push(PartialArguments(value), ".{}")


def _transformed(walk: Walk, value: object) -> None:
    # mx.compile, mx.checkpoint, mx.grad and the like hold the function they wrap, and compile the state it was given
    # as inputs=.
    if walk.visit(value):
        for held in referents(value):
            walk.look(held)


def _weak(walk: Walk, value: object) -> None:
    for held in referent(value):
        if not isinstance(held, mx.array):
            walk.look(held)


def _context(walk: Walk, value: ContextVar[object]) -> None:
    if walk.visit(value):
        walk.push(ContextValue(value), "")


def _iterator(walk: Walk, value: object) -> None:
    if walk.visit(value):
        walk.iterators.append((value, walk.path))
        if isinstance(value, zip | map | filter | enumerate):
            path = walk.path
            for held in referents(value):
                walk.path = path
                walk.look(held)


def _generator(walk: Walk, value: object) -> None:
    if walk.visit(value):
        walk.generators.append((value, walk.path))


def _module(walk: Walk, value: ModuleType) -> None:
    if not walk.made and not is_foreign(value.__name__) and walk.visit(value):
        walk.holders.append((value, walk.path))


def _function(walk: Walk, value: FunctionType) -> None:
    if walk.visit(value):
        walk._functions.append((value, walk.path))


_HANDLERS: dict[type, Callable[[Walk, Any], object]] = {
    **dict.fromkeys(PLAIN, _leave),
    **dict.fromkeys(TRANSFORMED, _transformed),
    mx.array: _array,
    tuple: _tuple,
    frozenset: _tuple,
    list: _list,
    dict: _dict,
    set: _set,
    deque: _list,
    FunctionType: _function,
    MethodType: _method,
    BuiltinMethodType: _builtin,
    ModuleType: _module,
    partial: _partial,
    SimpleNamespace: _object,
    type: _class,
    ref: _weak,
    ProxyType: _weak,
    CallableProxyType: _weak,
    ContextVar: _context,
    local: _object,
}
_handlers: Facts[Callable[[Walk, object], object]] = Facts()


def _handler(kind: type) -> Callable[[Walk, object], object]:
    """The function that walks instances of a class."""
    return _HANDLERS.get(kind) or _handlers.get(id(kind)) or _handlers.learn(kind, _choose(kind))


def _choose(kind: type) -> Callable[[Walk, Any], object]:
    if issubclass(kind, type):
        return _class
    for bases, handler in (
        ((tuple, frozenset), _tuple),
        (dict, _dict_like),
        ((list, deque), _list),
        (set, _set),
        (ref, _weak),
        (partial, _partial),
        (ModuleType, _module),
    ):
        if issubclass(kind, bases):
            return handler
    if _is_random(kind):
        return _generator
    root, _, below = kind.__module__.partition(".")
    if is_foreign(root) and root not in OPEN and (root != "mlx" or below.partition(".")[0] == "core"):
        return _iterator if issubclass(kind, Iterator) else _leave
    return _object if kind.__dictoffset__ or facts_of(kind).slots else _leave


def _is_random(kind: type) -> bool:
    """True for classes of random generators that have a state of their own."""
    numpy = sys.modules.get("numpy")
    drawing = (random.Random,) if numpy is None else (random.Random, numpy.random.Generator, numpy.random.RandomState)
    return issubclass(kind, drawing) and not issubclass(kind, random.SystemRandom)
