"""The names in code, followed: from functions and classes to the globals, modules and classes that they use."""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any, Protocol

import mlx.core as mx

from mlx_tune.reach.code_facts import MAKING, CodeNames, contents_of, functions_of, imported_by, is_foreign, names_in
from mlx_tune.reach.container_notes import Path
from mlx_tune.reach.places import PLAIN, Attributes, Cell, Defaults, Held, Items, SelectedItems


class Follower(Protocol):
    """A walk that code is followed for; `mlx_tune.reach.walk.Walk` says what each of these is."""

    path: Path | None
    home: str | None
    made: bool
    code: list[CodeNames]
    holders: list[tuple[Any, Path | None]]
    noted: dict[int, set[str]]
    asked: tuple[int, int]

    def look(self, value: object) -> object: ...

    def visit(self, value: object) -> bool: ...

    def push(self, place: Held, form: str) -> None: ...


def follow_class(walk: Follower, kind: Any, making: bool = False) -> None:
    """The functions and values of one class; how it is made only where a block may do so."""
    contents, held = contents_of(kind), vars(kind)
    for name in contents.functions:
        if making or name not in MAKING:
            for function in functions_of(held[name]):
                walk.path = (None, kind.__name__ + ".{}", name)
                walk.look(function)
    if contents.values:
        walk.path = (None, "{}", kind.__name__)
        _attributes(walk, kind, contents.values)


def _attributes(walk: Follower, kind: type, names: Iterable[str]) -> None:
    """Some attributes of a class."""
    if fresh := _fresh(walk, kind, names):
        walk.push(Attributes(kind, fresh), ".{}")


def _fresh(walk: Follower, holder: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those of some names that were not noted of a class, or of what a module holds, before: none is noted twice."""
    noted = walk.noted.setdefault(id(holder), set())
    fresh = tuple([name for name in names if name not in noted])
    noted.update(fresh)
    return fresh


def follow_function(walk: Follower, value: FunctionType, path: Path | None) -> None:
    """Follow what a function holds, and what its code names."""
    code = value.__code__
    walk.home = value.__module__
    if value.__closure__:
        for name, cell in zip(code.co_freevars, value.__closure__, strict=True):
            # The class that super() needs is never bound to anything else.
            if name != "__class__" and walk.visit(cell):
                walk.path = (None, "{}", name)
                walk.push(Cell(cell), "")
    walk.path = path
    if value.__defaults__ and not all(type(default) in PLAIN for default in value.__defaults__):
        walk.push(Defaults(value), "'s default {}")
    if value.__kwdefaults__ and walk.visit(value.__kwdefaults__):
        walk.push(Items(value.__kwdefaults__), "'s default {}")
    if walk.made or is_foreign(value.__module__):
        # A library's function holds what the caller gave it (functools.wraps, nn.value_and_grad), and names its own.
        return
    if value.__dict__ and walk.visit(value.__dict__):
        walk.push(Items(value.__dict__), ".{}")
    names, scope = names_in(code), value.__globals__
    walk.code.append(names)
    if names.loaded or names.stored:
        _named(walk, scope, names.loaded, names.stored, None, "{}")
    for name, placed in names.placed.items():
        _placed(walk, name, scope.get(name) if name in names.loaded else _closed_over(value, name), placed)
    for label, module in imported_by(value) if names.imported else ():
        walk.path = (None, "{}", label)
        walk.look(module)


def _closed_over(function: FunctionType, name: str) -> object:
    """The value of a variable that a function closes over, None where there is no such variable or it has no value."""
    if name not in function.__code__.co_freevars or function.__closure__ is None:
        return None
    return next(iter(Cell(function.__closure__[function.__code__.co_freevars.index(name)]).get()), None)


def _placed(walk: Follower, name: str, value: object, attributes: tuple[str, ...]) -> None:
    """A class or function that code assigns attributes of, new ones among them."""
    walk.path = (None, "{}", name)
    if isinstance(value, type):
        _attributes(walk, value, attributes)
    elif isinstance(value, FunctionType) and walk.visit(value.__dict__):
        walk.push(Items(value.__dict__), ".{}")


def _named(
    walk: Follower, scope: dict[str, object], loaded: Iterable[str], stored: Iterable[str], path: Path | None, form: str
) -> None:
    """The objects that names stand for in a module."""
    noted = dict.fromkeys(stored)
    for name in loaded:
        value = scope.get(name)
        kind = type(value)
        if kind in PLAIN:
            continue
        if kind is mx.array or issubclass(kind, tuple | frozenset):
            noted[name] = None
        else:
            walk.path = (path, form, name)
            walk.look(value)
    if noted and (fresh := _fresh(walk, scope, noted)):
        walk.path = path
        walk.push(SelectedItems(scope, fresh), form)


def follow_names(walk: Follower) -> bool:
    """Follow modules and classes to the names that code reads or assigns of anything; false where nothing is new."""
    size = (len(walk.code), len(walk.holders))
    if size == walk.asked:
        return False
    walk.asked = size
    read = dict.fromkeys(name for names in walk.code for name in names.read)
    assigned = dict.fromkeys(name for names in walk.code for name in names.assigned)
    for holder, path in list(walk.holders):
        held = vars(holder)
        if isinstance(holder, ModuleType):
            walk.home = holder.__name__
            _named(walk, held, [name for name in read if name in held], assigned, path, ".{}")
        else:
            walk.home, walk.path = holder.__module__, path
            _attributes(walk, holder, [name for name in assigned if name in held and type(held[name]) in PLAIN])
    return True
