"""The contents of classes, and the kinds of their objects: the functions and values to follow."""

from __future__ import annotations

from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any
from weakref import ref

import mlx.nn as nn

from mlx_tune.reach.code import is_foreign, names_in
from mlx_tune.reach.facts import Facts
from mlx_tune.reach.places import slot_names
from mlx_tune.substitution import is_substitute

#: Modules of the standard library whose objects are made to hold other people's.
OPEN = frozenset({"argparse", "collections", "functools", "types", "weakref"})


class Kind:
    """The facts of a class that do not change.

    Attributes:
        own: Itself, its bases and the class that it is an instance of with its bases: those that are looked into.
        foreign: True where it is a library's.
        home: Its module, None where it is a library's.
        slots: The attributes that it keeps in `__slots__`.
        is_module: True where it is an `nn.Module`.
    """

    __slots__ = ("foreign", "home", "is_module", "own", "slots")

    def __init__(self, kind: type) -> None:
        above: type = type(kind)
        # As references, since a fact must not hold what it is about.
        self.own = tuple(
            ref(base)
            for base in (*kind.__mro__, *above.__mro__)
            if not is_foreign(base.__module__) and not is_substitute(base)
        )
        self.foreign = is_foreign(kind.__module__)
        self.home = None if self.foreign else kind.__module__
        self.slots = slot_names(kind)
        self.is_module = issubclass(kind, nn.Module)


_kinds: Facts[Kind] = Facts()


def facts_of(kind: type) -> Kind:
    """The facts of a class that do not change, found once."""
    return _kinds.get(id(kind)) or _kinds.learn(kind, Kind(kind))


class Contents:
    """Where a class holds functions and values.

    Attributes:
        types: The types of everything in it, to notice that it was changed (mlx-lm replaces `__call__`).
        functions: The names of functions, class methods, static methods and properties.
        values: The names of arrays, containers and objects, of numbers and flags that its code assigns, and of
            anything that its class methods assign.
    """

    __slots__ = ("functions", "types", "values")

    def __init__(self, types: list[int], functions: tuple[str, ...], values: tuple[str, ...]) -> None:
        self.types = types
        self.functions = functions
        self.values = values


_contents: Facts[Contents] = Facts()

#: What only shows an object. A data class writes one of them out, with closures of its own.
_SHOWING = frozenset({"__repr__", "__str__", "__rich_repr__"})

#: What only makes one.
MAKING = frozenset({"__new__", "__init__", "__post_init__"})

#: Entries of a class that hold nothing that could be an array, and those that may be counters and flags.
_NOTHING = (MemberDescriptorType, GetSetDescriptorType, ModuleType)
_PLAIN = (int, float, complex, str, bytes, type(None))


def contents_of(kind: type) -> Contents:
    """Where one class, apart from those it inherits from, holds functions and values."""
    held = vars(kind)
    types = [id(type(value)) for value in held.values()]
    known = _contents.get(id(kind))
    if known is not None and known.types == types:
        return known
    functions: list[str] = []
    values: list[str] = []
    plain: list[str] = []
    assigned: set[str] = set()
    made: dict[str, None] = {}
    for name, value in held.items():
        if isinstance(value, FunctionType | staticmethod | classmethod | property):
            if name not in _SHOWING:
                functions.append(name)
            for function in functions_of(value):
                if name not in MAKING and isinstance(function, FunctionType):
                    assigned.update(names_in(function.__code__).assigned)
                    if isinstance(value, classmethod):
                        made.update(names_in(function.__code__).assigned)
        elif isinstance(value, _PLAIN):
            plain.append(name)
        elif not isinstance(value, _NOTHING) and (hasattr(value, "__get__") or not name.startswith("__")):
            values.append(name)
    values += [name for name in plain if name in assigned] + [name for name in made if name not in held]
    return _contents.learn(kind, Contents(types, tuple(functions), tuple(values)))


def referent(weak: Any) -> tuple[Any, ...]:
    """The object that a weak reference or proxy stands for, if that is still there."""
    try:
        # A proxy hands every look-up on to what it stands for, bound methods included.
        return (weak() if isinstance(weak, ref) else weak.__repr__.__self__,)
    except ReferenceError:
        return ()


def functions_of(value: Any) -> tuple[Any, ...]:
    """The functions behind one entry of a class."""
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, property):
        return tuple(f for f in (value.fget, value.fset, value.fdel) if f is not None)
    return (value,)
