"""The reach of a block: every array it may use, and every container it may write to.

A block's gradient must reach each array that the block used, wherever it took it from, and running the block a
second time must start from what the containers held the first time and leave no mark in them. So before a call
everything reachable is noted: arguments, attributes, items, closures, defaults, classes, and the globals that the
code names. The walk knows arrays by identity; a tied weight is one array in two places.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from threading import local
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import CallableProxyType, ProxyType, ref

import mlx.core as mx

from mlx_tune.checkpointing.block.notes import Note, Ref, Remade
from mlx_tune.places import (
    Attributes,
    Cell,
    ContextValue,
    Defaults,
    Held,
    Items,
    Members,
    ModuleAttributes,
    Names,
    PartialArguments,
    Sequence,
)
from mlx_tune.reach.classes import MAKING, OPEN, contents_of, facts_of, functions_of, referent
from mlx_tune.reach.code import global_names, is_foreign, modules_inside, names_in_module
from mlx_tune.reach.facts import Facts

_MISSING = object()

#: Values of these types hold nothing.
_PLAIN: frozenset[type] = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type(...), range, slice, mx.Dtype}
)


class Walk:
    """Walks values and notes arrays and containers, each once, in an order that only depends on the values.

    Args:
        known: Containers not to enter, by identity: what an earlier walk has `seen`.
        wanted: Which arrays to note; others are left where they are.
        made: Walk what code has made: only what values hold counts, and not what the code of their classes names.

    Attributes:
        arrays: The arrays found.
        notes: The containers found, with what they held. They hold arrays until they are told to forget them.
        seen: Everything entered, by identity, which holds on to it so that nothing else can have that identity.
        iterators: Iterators found that only run once.
    """

    def __init__(
        self,
        known: Mapping[int, Any] | None = None,
        wanted: Callable[[mx.array], bool] | None = None,
        made: bool = False,
    ) -> None:
        self.arrays: list[mx.array] = []
        self.notes: list[Note] = []
        self.seen: dict[int, Any] = {}
        self.iterators: list[Any] = []
        self._known = known or {}
        self._wanted = wanted
        self._made = made
        self._index: dict[int, int] = {}
        self._functions: list[FunctionType] = []
        self._entered = 0

    def add(self, value: Any) -> Any:
        """Note a value and everything below it; returns what stands for it."""
        template = self._encode(value)
        notes, functions = self.notes, self._functions
        while True:
            if functions:
                _look_into(self, functions.pop())
            elif self._entered < len(notes):
                self._enter(notes[self._entered])
                self._entered += 1
            else:
                return template

    def _encode(self, value: Any) -> Any:
        """The stand-in for a value: a template, or the value itself."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        mark = (_HANDLERS.get(kind) or _handler(kind))(self, value)
        return value if mark is None else mark

    def _enter(self, note: Note) -> None:
        items, marks = note.items, note.marks
        if len(items) > 16 and _PLAIN.issuperset(map(type, items.values() if type(items) is dict else items)):
            return  # tokens and vocabularies can be long
        for key, value in items.items() if type(items) is dict else enumerate(items):
            kind = type(value)
            if kind in _PLAIN:
                continue
            mark = (_HANDLERS.get(kind) or _handlers.get(id(kind)) or _handler(kind))(self, value)
            if mark is not None:
                marks[key] = mark

    def _push(self, place: Held) -> None:
        self.notes.append(Note(place))

    def _visit(self, value: Any) -> bool:
        """True the first time."""
        seen, identity = self.seen, id(value)
        if identity in seen or identity in self._known:
            return False
        seen[identity] = value
        return True


# Handlers: each notes a value, and returns a template where one has to stand for it.


def _leave(walk: Walk, value: Any) -> None:
    """Leave the value alone: it has no parts to enter."""


def _array(walk: Walk, value: mx.array) -> Ref | None:
    if walk._wanted is not None and not walk._wanted(value):
        return None
    index = walk._index.get(id(value))
    if index is None:
        index = walk._index[id(value)] = len(walk.arrays)
        walk.arrays.append(value)
    return Ref(index)


def _tuple(walk: Walk, value: Any) -> Remade | None:
    items = [walk._encode(item) for item in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return None
    return Remade(type(value), items, getattr(value, "__dict__", None))


def _set(walk: Walk, value: set[Any]) -> None:
    if walk._visit(value) and not all(type(item) in _PLAIN for item in value):
        walk._push(Members(value))


def _list(walk: Walk, value: Any) -> None:
    if walk._visit(value):
        walk._push(Sequence(value))
        if type(value) is not list:
            _own(walk, value)


def _dict(walk: Walk, value: Any) -> None:
    if walk._visit(value):
        walk._push(Items(value))


def _dict_like(walk: Walk, value: Any) -> None:
    """A dictionary of a class of its own: a module, or what a model returns."""
    if walk._visit(value):
        walk._push(Items(value))
        _own(walk, value)


def _object(walk: Walk, value: Any) -> None:
    if walk._visit(value):
        _own(walk, value)


def _own(walk: Walk, value: Any) -> None:
    """Attributes of an object, and what its class's code names."""
    kind = type(value)
    facts = facts_of(kind)
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict and walk._visit(attributes):
        if not facts.is_module:
            walk._push(Items(attributes))
        elif not (facts.foreign and _is_plain(attributes)):
            # MLX's own layers do not change their numbers and flags when they are called.
            walk._push(ModuleAttributes(attributes))
    if facts.slots:
        walk._push(Attributes(value, facts.slots))
    if facts.own and not walk._made and walk._visit(facts):
        for base in facts.own:
            _class_itself(walk, base())


def _is_plain(attributes: dict[str, Any]) -> bool:
    """True where there is nothing in them to enter."""
    return all(type(value) in _PLAIN or (not value and type(value) is set) for value in attributes.values())


def _class_itself(walk: Walk, kind: Any, making: bool = False) -> None:
    """The functions and values of one class; how it is made only where a block may do so."""
    contents, held = contents_of(kind), vars(kind)
    for name in contents.functions:
        if making or name not in MAKING:
            for function in functions_of(held[name]):
                _handler(type(function))(walk, function)
    if contents.values and walk._visit(contents):
        walk._push(Attributes(kind, contents.values))


def _class(walk: Walk, value: type) -> None:
    """A class that a block names or holds: it may read its attributes, or make an object of it."""
    if not walk._made and walk._visit(value):
        for base in facts_of(value).own:
            _class_itself(walk, base(), making=True)
        if type(value) is not type:
            _own(walk, value)


def _method(walk: Walk, value: MethodType) -> None:
    walk._encode(value.__self__)
    walk._encode(value.__func__)


def _builtin(walk: Walk, value: BuiltinMethodType) -> None:
    walk._encode(value.__self__)  # such as the list of its append


def _partial(walk: Walk, value: Any) -> None:
    # A partial's arguments are read-only, but __setstate__ replaces them.
    if walk._visit(value):
        walk._push(PartialArguments(value))


def _transformed(walk: Walk, value: Any) -> None:
    # mx.compile, mx.checkpoint, mx.grad and the like hold the function they wrap, and compile the state it was given
    # as inputs=, where only the garbage collector sees them.
    if walk._visit(value):
        for held in gc.get_referents(value):
            if not isinstance(held, type):
                walk._encode(held)


def _weak(walk: Walk, value: Any) -> None:
    for held in referent(value):
        if not isinstance(held, mx.array):
            walk._encode(held)


def _context(walk: Walk, value: ContextVar[Any]) -> None:
    if walk._visit(value):
        walk._push(ContextValue(value))


def _iterator(walk: Walk, value: Any) -> None:
    walk.iterators.append(value)


def _function(walk: Walk, value: FunctionType) -> None:
    if walk._visit(value):
        walk._functions.append(value)


def _look_into(walk: Walk, value: FunctionType) -> None:
    """Follow what a function holds, and what its code names."""
    code = value.__code__
    if value.__closure__:
        for name, cell in zip(code.co_freevars, value.__closure__, strict=True):
            # The class that super() needs is never bound to anything else.
            if name != "__class__" and walk._visit(cell):
                walk._push(Cell(cell))
    if value.__defaults__ and not all(type(default) in _PLAIN for default in value.__defaults__):
        walk._push(Defaults(value))
    if value.__kwdefaults__:
        walk._encode(value.__kwdefaults__)
    if walk._made or is_foreign(value.__module__):
        # A library's function holds what the caller gave it (functools.wraps, nn.value_and_grad), and names its own.
        return
    if value.__dict__:
        walk._encode(value.__dict__)
    names = global_names(code)
    if names.loaded or names.stored:
        _named(walk, value.__globals__, names.loaded, names.stored, names.placed)
    if names.inner or names.imported:
        for module in modules_inside(value):
            _of_module(walk, *module)


def _named(
    walk: Walk,
    scope: dict[str, Any],
    loaded: dict[str, tuple[str, ...]],
    stored: tuple[str, ...],
    placed: Mapping[str, tuple[str, ...]],
) -> None:
    """The objects that names stand for in a module."""
    noted = list(stored)
    for name, attributes in loaded.items():
        value = scope.get(name, _MISSING)
        kind = type(value)
        if value is _MISSING or kind in _PLAIN:
            continue
        if isinstance(value, ModuleType):
            if attributes or name in placed:
                _of_module(walk, name, value, attributes, placed.get(name, ()))
            continue
        handler = _HANDLERS.get(kind) or _handler(kind)
        if name in placed and handler is _class:
            walk._push(Attributes(value, placed[name]))
        if handler is _array or handler is _tuple:
            if name not in noted:
                noted.append(name)
        else:
            handler(walk, value)
    if noted:
        walk._push(Names(scope, tuple(noted)))


def _of_module(walk: Walk, name: str, module: ModuleType, asked: tuple[str, ...], placed: tuple[str, ...]) -> None:
    """The names that code reads and assigns of a module, and of modules in it."""
    if not is_foreign(module.__name__):
        for _, held, loaded, stored in names_in_module(name, module, asked, placed):
            # Modules in it come by themselves: nothing is asked of them here.
            _named(walk, held, dict.fromkeys(loaded, ()), stored, {})


_TRANSFORMED = {type(mx.compile(abs)), type(mx.checkpoint(abs)), type(mx.custom_function(abs))}

_HANDLERS: dict[type, Callable[[Walk, Any], Any]] = {
    **dict.fromkeys(_PLAIN, _leave),
    **dict.fromkeys(_TRANSFORMED, _transformed),
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
    partial: _partial,
    SimpleNamespace: _object,
    type: _class,
    ref: _weak,
    ProxyType: _weak,
    CallableProxyType: _weak,
    ContextVar: _context,
    local: _object,
}
_handlers: Facts[Callable[[Walk, Any], Any]] = Facts()


def _handler(kind: type) -> Callable[[Walk, Any], Any]:
    """The function that walks instances of a class."""
    return _HANDLERS.get(kind) or _handlers.get(id(kind)) or _handlers.learn(kind, _choose(kind))


def _choose(kind: type) -> Callable[[Walk, Any], Any]:
    if issubclass(kind, type):
        return _class
    for bases, handler in (
        ((tuple, frozenset), _tuple),
        (dict, _dict_like),
        ((list, deque), _list),
        (set, _set),
        (ref, _weak),
        (partial, _partial),
    ):
        if issubclass(kind, bases):
            return handler
    if issubclass(kind, ModuleType):
        return _leave
    root, _, below = kind.__module__.partition(".")
    if is_foreign(root) and root not in OPEN and (root != "mlx" or below.partition(".")[0] == "core"):
        return _iterator if issubclass(kind, Iterator) else _leave
    return _object if kind.__dictoffset__ or facts_of(kind).slots else _leave
