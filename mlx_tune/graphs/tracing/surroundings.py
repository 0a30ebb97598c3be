"""The surroundings of a step: everything besides its state that its code can reach and change.

A trace runs the step's Python once with placeholders for arrays. Anything of that which stays behind in a list, an
attribute or a global would break later code, so those places are noted before and put back after.
"""

from __future__ import annotations

import copy
import gc
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from threading import local
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
)
from typing import Any
from weakref import CallableProxyType, ProxyType, ref

import mlx.core as mx

from mlx_tune.graphs.tracing.built import made_by_operations
from mlx_tune.places import (
    Attributes,
    Cell,
    ContextValue,
    Defaults,
    Items,
    Members,
    Names,
    Place,
    Sequence,
    slot_names,
)
from mlx_tune.reach.classes import OPEN, contents_of, functions_of, referent
from mlx_tune.reach.code import global_names, modules_inside, names_in_module

#: How many items to note at most, the nearest first: a data set that the step can reach has millions.
MOST_ITEMS = 1_000_000

#: Packages whose models and optimizers are looked at, and their code only for what was put into its closures.
_OWN = {"mlx", "mlx_lm", "mlx_tune"}
#: Where pip puts packages. What they keep to themselves is theirs: an experiment's logger works on in its own threads.
_INSTALLED = {"site-packages", "dist-packages"}
_LEAVES = {bool, int, float, complex, str, bytes, type(None), ModuleType, CodeType, range, mx.Dtype}
_TRANSFORMED = {type(mx.compile(abs)), type(mx.checkpoint(abs)), type(mx.custom_function(abs))}
_ITERATORS = {type(it) for it in (iter([]), iter(()), iter({}), iter(set()), iter(range(0)), reversed([]))}
_WRAPPERS = (zip, map, filter, enumerate)

_Path = tuple[Any, str, Any]  # where the thing that holds it is, how it holds it, and under which key


class Surroundings:
    """Everything that changes when a step's code writes to it, to be put back.

    Args:
        step: The function that will be traced.
        state: Objects that it is expected to change; put back elsewhere.
    """

    def __init__(self, step: Callable[..., Any], state: Any) -> None:
        self._noted: list[tuple[_Path, str, Place, Any]] = []
        self._arrays: list[tuple[_Path, mx.array, mx.array]] = []
        self._iterators: list[tuple[_Path, Any, Any]] = []
        self._seen = {id(container) for container in _state_containers(state)}
        self._home = (getattr(step, "__module__", None) or "").partition(".")[0]
        self._room = MOST_ITEMS
        self._waiting: deque[tuple[_Path, Any]] = deque([((None, "{}", "step"), step)])
        while self._waiting:
            self._look(*self._waiting.popleft())
        self._lazy = made_by_operations(array for _, array, _ in self._arrays)

    def restore(self) -> list[str]:
        """Put everything back; return the places where arrays were left behind."""
        left: list[str] = []
        for path, form, place, before in self._noted:
            now = place.get()
            left += [_text((path, form, key)) for key, value in _changes(before, now) if _holds_array(value)]
            place.put(before)
        made = made_by_operations(array for _, array, _ in self._arrays)
        for path, array, values in self._arrays:
            if id(array) in made:
                array[...] = values
                if id(array) not in self._lazy:  # of those that were not there yet it cannot be told
                    left.append(_text(path))
        return left

    def advanced(self) -> list[str]:
        """The iterators that gave something away meanwhile, which cannot be put back."""
        moved = (path for path, iterator, before in self._iterators if _position(iterator) != before)
        return list(dict.fromkeys(map(_text, moved)))

    def _look(self, path: _Path, thing: Any) -> None:
        if id(thing) in self._seen:
            return
        self._seen.add(id(thing))
        if isinstance(thing, mx.array):
            # In-place writing gives the same object other values; a second handle keeps the old ones.
            self._arrays.append((path, thing, copy.copy(thing)))
        elif type(thing) in _TRANSFORMED:
            # mx.compile, mx.grad and the like pass for the function that they hold; that, and the state they were
            # given, only the garbage collector sees.
            self._queue(path, "", enumerate(gc.get_referents(thing)))
        elif isinstance(thing, CellType):
            self._note(path, "", Cell(thing))
        elif isinstance(thing, dict):
            self._note(path, "[{!r}]", Items(thing))
            self._look_at_attributes(path, thing)
        elif isinstance(thing, (list, deque)):
            self._note(path, "[{!r}]", Sequence(thing))
            self._look_at_attributes(path, thing)
        elif isinstance(thing, set):
            self._note(path, "", Members(thing))
        elif isinstance(thing, (tuple, frozenset)):
            self._queue(path, "[{!r}]" if isinstance(thing, tuple) else "", enumerate(thing))
        elif isinstance(thing, FunctionType):
            self._look_at_function(path, thing)
        elif isinstance(thing, MethodType):
            self._queue(None, "{}", [("self", thing.__self__), (thing.__name__, thing.__func__)])
        elif isinstance(thing, BuiltinMethodType):
            self._queue(path, "", enumerate([thing.__self__]))  # such as the append of a list
        elif isinstance(thing, partial):
            self._queue(path, ".{}", [("func", thing.func), ("args", thing.args), ("keywords", thing.keywords)])
        elif type(thing) in _ITERATORS or isinstance(thing, GeneratorType):
            self._iterators.append((path, thing, _position(thing)))
        elif isinstance(thing, _WRAPPERS):
            self._queue(path, "", enumerate(gc.get_referents(thing)))
        elif isinstance(thing, (ref, ProxyType, CallableProxyType)):
            self._queue(path, "", enumerate(referent(thing)))
        elif isinstance(thing, ContextVar):
            self._note(path, "", ContextValue(thing))
        elif isinstance(thing, type):
            if not self._is_foreign(thing.__module__):
                self._look_at_class(thing)
        elif _is_random(thing):
            self._note(path, "", _Draws(thing))
        elif not self._looks_after_itself(type(thing)):
            self._look_at_attributes(path, thing)
            self._queue(None, "{}", [(base.__name__, base) for base in type(thing).__mro__])

    def _look_at_function(self, path: _Path, function: FunctionType) -> None:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._queue(None, "{}", cells)
        if self._is_foreign(function.__module__):
            return  # such as functools.wraps and nn.value_and_grad, which hold what they were given in their closures
        self._note(path, ".{}", Items(function.__dict__))
        self._note(path, "'s default {}", Defaults(function))
        self._note(path, "'s default {}", Items(function.__kwdefaults__ or {}))
        names, scope = global_names(function.__code__), function.__globals__
        self._note(None, "{}", Names(scope, (*names.loaded, *names.stored)))
        for name, placed in names.placed.items():
            if isinstance(kind := scope.get(name), type):
                self._note(None, name + ".{}", Attributes(kind, placed))
        modules = [(name, scope.get(name), asked, names.placed.get(name, ())) for name, asked in names.loaded.items()]
        for name, module, asked, placed in [*modules, *modules_inside(function)]:
            if isinstance(module, ModuleType) and not self._is_foreign(module.__name__):
                for label, held, loaded, stored in names_in_module(name, module, asked, placed):
                    self._note(None, label + ".{}", Names(held, (*loaded, *stored)))

    def _look_at_attributes(self, path: _Path, thing: Any) -> None:
        attributes = getattr(thing, "__dict__", None)
        if type(attributes) is dict:
            self._note(path, ".{}", Items(attributes))
        if names := slot_names(type(thing)):
            self._note(path, ".{}", Attributes(thing, names))

    def _look_at_class(self, kind: type) -> None:
        """Look at what a class itself holds, or is given by its own functions, and what those name."""
        held, contents, assigned = vars(kind), contents_of(kind), set[str]()
        for name in contents.functions:
            functions = functions_of(held[name])
            self._queue(None, f"{kind.__name__}.{{}}", [(name, function) for function in functions])
            for function in functions:
                if isinstance(function, FunctionType):
                    assigned |= global_names(function.__code__).assigned
        plain = [n for n, v in held.items() if not n.startswith("__") and not hasattr(type(v), "__get__")]
        self._note(None, f"{kind.__name__}.{{}}", Attributes(kind, tuple({*plain, *contents.values, *assigned})))
        above: type = type(kind)
        self._queue(None, "{}", [(base.__name__, base) for base in (*kind.__mro__, *above.__mro__)])

    def _is_foreign(self, module: str | None) -> bool:
        """True where code of a module is not looked into, but for what it was given."""
        root = (module or "").partition(".")[0]
        return root in _OWN or (root != self._home and _is_installed(root))

    def _looks_after_itself(self, kind: type) -> bool:
        """True where objects of a class are left alone: locks, files and threads, arrays of other libraries."""
        root, _, below = kind.__module__.partition(".")
        if root in OPEN or issubclass(kind, local):
            return False
        return below.partition(".")[0] == "core" if root in _OWN else self._is_foreign(kind.__module__)

    def _note(self, path: Any, form: str, place: Place) -> None:
        """Note what a place holds, and look at that later."""
        before = place.get()
        if len(before) >= self._room:
            return
        self._room -= 1 + len(before)
        self._noted.append((path, form, place, before))
        if set(map(type, before.values() if isinstance(before, dict) else before)) <= _LEAVES:
            return  # tokens, most of the time
        self._queue(path, form, before.items() if isinstance(before, dict) else enumerate(before))

    def _queue(self, path: Any, form: str, items: Iterable[tuple[Any, Any]]) -> None:
        for key, value in items:
            if type(value) not in _LEAVES:
                self._waiting.append(((path, form, key) if form else path, value))


class _Draws:
    """The state of a random generator that the step may draw from."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def get(self) -> list[Any]:
        if hasattr(self.held, "bit_generator"):
            return [self.held.bit_generator.state]
        return [self.held.getstate() if isinstance(self.held, random.Random) else self.held.get_state()]

    def put(self, items: list[Any]) -> None:
        if hasattr(self.held, "bit_generator"):
            self.held.bit_generator.state = items[0]
        elif isinstance(self.held, random.Random):
            self.held.setstate(items[0])
        else:
            self.held.set_state(items[0])


def _is_random(thing: Any) -> bool:
    if isinstance(thing, random.Random):
        return not isinstance(thing, random.SystemRandom)
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(thing, (numpy.random.Generator, numpy.random.RandomState))


def _position(iterator: Any) -> Any:
    """The position of an iterator; the same only while nothing was taken from it."""
    if isinstance(iterator, GeneratorType):
        return iterator.gi_frame.f_lasti if iterator.gi_frame is not None else None
    return operator.length_hint(iterator, -1)


def _state_containers(state: Any) -> Iterator[Any]:
    """The containers that the snapshot of the state sees to."""
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


@cache
def _is_installed(root: str) -> bool:
    """True where a package belongs to Python or was installed, other than what the step's author works on."""
    if root in sys.stdlib_module_names or root == "nanobind":
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return not _INSTALLED.isdisjoint(Path(file).parts)


def _changes(before: Any, now: Any) -> Iterator[tuple[Any, Any]]:
    """The values that a place holds and did not hold before, with their keys."""
    if len(now) == len(before) and all(
        map(operator.is_, now.values(), before.values()) if isinstance(now, dict) else map(operator.is_, now, before)
    ):
        return
    if isinstance(now, dict):
        yield from ((key, value) for key, value in now.items() if key not in before or before[key] is not value)
        return
    known = set(map(id, before))
    yield from ((key, value) for key, value in enumerate(now) if id(value) not in known)


def _holds_array(value: Any, depth: int = 6) -> bool:
    if isinstance(value, mx.array):
        return True
    if depth == 0:
        return False
    if isinstance(value, dict):
        return any(_holds_array(item, depth - 1) for item in value.values())
    if isinstance(value, (list, tuple, set, deque)):
        return any(_holds_array(item, depth - 1) for item in value)
    attributes = getattr(value, "__dict__", None)
    return (
        type(attributes) is dict
        and not isinstance(value, (FunctionType, ModuleType))
        and _holds_array(attributes, depth - 1)
    )


def _text(path: _Path) -> str:
    """Where something is, as one would write it."""
    parts: list[str] = []
    step: Any = path
    while step is not None:
        step, form, key = step
        parts.append(form.format(key))
    return "".join(reversed(parts))
