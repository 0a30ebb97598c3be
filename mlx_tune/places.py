"""Places that hold values and can be put back: one small class for each way Python has of holding something.

Each reads what it holds as a new dictionary or list, and puts such a reading back, touching only what differs.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from operator import is_
from types import FunctionType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

_MISSING = object()


class Place(Protocol):
    """Something that holds values."""

    def get(self) -> Any:
        """What it holds, as a dictionary or list of its own."""

    def put(self, items: Any) -> None:
        """Hold this again."""


class Items:
    """A dictionary: a plain one, a module's parameters, or an object's attributes.

    A subclass may make something else of reading and writing, so the class below is asked. An OrderedDict keeps its
    order beside the dictionary, and has to be asked itself.
    """

    __slots__ = ("held", "kind")

    def __init__(self, held: dict[Any, Any]) -> None:
        self.held = held
        self.kind: type[dict[Any, Any]] = OrderedDict if isinstance(held, OrderedDict) else dict

    def get(self) -> dict[Any, Any]:
        """A copy."""
        return dict.copy(self.held)

    def put(self, items: dict[Any, Any]) -> None:
        """Set what differs; where keys were added or removed, rebuild so that the order is the old one too."""
        held, kind = self.held, self.kind
        if len(held) == len(items) and all(map(is_, dict.values(held), items.values())):
            return
        if dict.keys(held) != items.keys():
            kind.clear(held)
            kind.update(held, items)
            return
        for key, value in items.items():
            if dict.__getitem__(held, key) is not value:
                kind.__setitem__(held, key, value)


class ModuleAttributes(Items):
    """What a module holds next to its arrays and modules: numbers, flags, plain objects."""

    __slots__ = ()


class Sequence:
    """A list or a deque."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def get(self) -> list[Any]:
        """A copy as a list."""
        return list(self.held)

    def put(self, items: list[Any]) -> None:
        """Replace the whole, where anything differs."""
        held = self.held
        if len(held) == len(items) and all(map(is_, held, items)):
            return
        held.clear()
        held.extend(items)


class Members:
    """A set."""

    __slots__ = ("held",)

    def __init__(self, held: set[Any]) -> None:
        self.held = held

    def get(self) -> list[Any]:
        """Its members in some order."""
        return list(self.held)

    def put(self, items: list[Any]) -> None:
        """Replace the whole, where anything differs."""
        if len(self.held) == len(items) and all(item in self.held for item in items):
            return
        self.held.clear()
        self.held.update(items)


class Cell:
    """A variable that a function closes over."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def get(self) -> list[Any]:
        """One item, or none where the variable is not bound yet."""
        try:
            return [self.held.cell_contents]
        except ValueError:
            return []

    def put(self, items: list[Any]) -> None:
        """Bind it again, or unbind it."""
        if items:
            self.held.cell_contents = items[0]
        elif self.get():
            del self.held.cell_contents


class Defaults:
    """A function's defaults for positional arguments."""

    __slots__ = ("held",)

    def __init__(self, held: FunctionType) -> None:
        self.held = held

    def get(self) -> list[Any]:
        """The defaults in order."""
        return list(self.held.__defaults__ or ())

    def put(self, items: list[Any]) -> None:
        """Set them where any differs."""
        now = self.held.__defaults__ or ()
        if len(now) != len(items) or not all(map(is_, now, items)):
            self.held.__defaults__ = tuple(items) or None


class PartialArguments:
    """What `functools.partial` has bound."""

    __slots__ = ("held",)

    def __init__(self, held: partial[Any]) -> None:
        self.held = held

    def get(self) -> list[Any]:
        """The function, the positional and the named arguments."""
        return [self.held.func, self.held.args, self.held.keywords]

    def put(self, items: list[Any]) -> None:
        """Set them where any differs."""
        if not all(map(is_, self.get(), items)):
            function, arguments, named = items
            held: Any = self.held
            held.__setstate__((function, arguments, named, held.__dict__ or None))


class Names:
    """Some names of a dictionary, such as the globals that a function uses."""

    __slots__ = ("held", "names")

    def __init__(self, held: dict[str, Any], names: tuple[str, ...]) -> None:
        self.held = held
        self.names = names

    def get(self) -> dict[str, Any]:
        """Those that are there."""
        held = self.held
        return {name: held[name] for name in self.names if name in held}

    def put(self, items: dict[str, Any]) -> None:
        """Set or remove these names, and no others."""
        for name in self.names:
            if name not in items:
                self.held.pop(name, None)
            elif self.held.get(name, _MISSING) is not items[name]:
                self.held[name] = items[name]


class Attributes:
    """Some attributes of an object without a dictionary (`__slots__`), or of a class."""

    __slots__ = ("held", "names")

    def __init__(self, held: Any, names: tuple[str, ...]) -> None:
        self.held = held
        self.names = names

    def get(self) -> dict[str, Any]:
        """Those that are set."""
        found = {name: getattr(self.held, name, _MISSING) for name in self.names}
        return {name: value for name, value in found.items() if value is not _MISSING}

    def put(self, items: dict[str, Any]) -> None:
        """Set or remove these, past any `__setattr__` that a frozen class defines."""
        assign, remove = (
            (type.__setattr__, type.__delattr__)
            if isinstance(self.held, type)
            else (object.__setattr__, object.__delattr__)
        )
        for name in self.names:
            now = getattr(self.held, name, _MISSING)
            if name in items:
                if now is not items[name]:
                    assign(self.held, name, items[name])
            elif now is not _MISSING:
                remove(self.held, name)


_slots: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def slot_names(kind: type) -> tuple[str, ...]:
    """The attributes that a class keeps in `__slots__`, under the names they have outside the class."""
    if kind in _slots:
        return _slots[kind]
    names: list[str] = []
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in ("__dict__", "__weakref__"):
                continue
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    _slots[kind] = tuple(names)
    return _slots[kind]
