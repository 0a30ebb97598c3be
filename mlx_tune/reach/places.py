"""Places that hold values and can be put back: one small class for each way Python has of holding something.

Each reads what it holds as a new dictionary or list, tells whether it still holds that, and puts such a reading back,
touching only what differs.
"""

from __future__ import annotations

from collections import OrderedDict
from contextvars import ContextVar
from operator import is_
from types import ModuleType
from typing import Any

import mlx.core as mx

_MISSING = object()

#: Values of these types hold nothing.
PLAIN: frozenset[type] = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type(...), range, slice, mx.Dtype}
)


class Held:
    """The places of this file.

    Attributes:
        held: The container.
    """

    __slots__ = ("held",)

    def __init__(self, held: object) -> None:
        self.held: Any = held

    def get(self) -> Any:
        """The contents, as a dictionary or list of its own."""
        raise NotImplementedError

    def put(self, items: Any) -> None:
        """Hold this again."""
        raise NotImplementedError

    def same(self, items: Any) -> bool:
        """True where it holds the very same objects as in this reading, in the same order."""
        return same_items(self.get(), items)


def same_items(a: Any, b: Any) -> bool:
    """True where two readings of a place hold the very same objects in the same order."""
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return all(map(is_, a.values(), b.values())) and all(map(is_, a, b))
    return all(map(is_, a, b))


class Items(Held):
    """A dictionary: a plain one, a module's parameters, or an object's attributes.

    A subclass may make something else of reading and writing, so the class below is asked. An OrderedDict keeps its
    order beside the dictionary, and has to be asked itself.
    """

    __slots__ = ("kind",)

    def __init__(self, held: dict[Any, object]) -> None:
        super().__init__(held)
        self.kind: type[dict[object, object]] = OrderedDict if isinstance(held, OrderedDict) else dict

    def get(self) -> dict[object, object]:
        """A copy."""
        return dict.copy(self.held) if self.kind is dict else dict(OrderedDict.items(self.held))

    def same(self, items: dict[object, object]) -> bool:
        """Compared where it lies."""
        held, kind = self.held, self.kind
        return (
            len(held) == len(items)
            and all(map(is_, kind.values(held), items.values()))
            and all(map(is_, kind.__iter__(held), items))
        )

    def put(self, items: dict[object, object]) -> None:
        """Set what differs; where keys were added, removed or renamed, rebuild so that the order is the old one too."""
        held, kind = self.held, self.kind
        if len(held) != len(items) or not all(map(is_, kind.__iter__(held), items)):
            kind.clear(held)
            kind.update(held, items)
            return
        for key, value in items.items():
            if dict.__getitem__(held, key) is not value:
                kind.__setitem__(held, key, value)


class ModuleAttributes(Items):
    """The values of a module next to its arrays and modules: numbers, flags, plain objects."""

    __slots__ = ()


class Sequence(Held):
    """A list or a deque."""

    __slots__ = ()

    def get(self) -> list[object]:
        """A copy as a list."""
        return list(self.held)

    def same(self, items: list[object]) -> bool:
        """Compared where it lies."""
        return len(self.held) == len(items) and all(map(is_, self.held, items))

    def put(self, items: list[object]) -> None:
        """Replace the whole, where anything differs."""
        if not self.same(items):
            self.held.clear()
            self.held.extend(items)


class Members(Held):
    """A set. In which order other arrays come out of it is up to where they lie."""

    __slots__ = ()

    def get(self) -> list[object]:
        """Its members in some order."""
        return list(self.held)

    def same(self, items: list[object]) -> bool:
        """True where these are its members, in any order."""
        return len(self.held) == len(items) and set(map(id, self.held)) == set(map(id, items))

    def put(self, items: list[object]) -> None:
        """Replace the whole, where anything differs."""
        if not self.same(items):
            self.held.clear()
            self.held.update(items)


class Cell(Held):
    """A variable that a function closes over."""

    __slots__ = ()

    def get(self) -> list[object]:
        """One item, or none where the variable is not bound yet."""
        try:
            return [self.held.cell_contents]
        except ValueError:
            return []

    def put(self, items: list[object]) -> None:
        """Bind it again, or unbind it."""
        if items:
            self.held.cell_contents = items[0]
        elif self.get():
            del self.held.cell_contents


class Defaults(Held):
    """A function's defaults for positional arguments."""

    __slots__ = ()

    def get(self) -> list[object]:
        """The defaults in order."""
        return list(self.held.__defaults__ or ())

    def put(self, items: list[object]) -> None:
        """Set them where any differs."""
        if not self.same(items):
            self.held.__defaults__ = tuple(items) or None


class PartialArguments(Held):
    """The arguments that `functools.partial` has bound."""

    __slots__ = ()

    def get(self) -> dict[str, object]:
        """The function, the positional and the named arguments, under their attributes' names."""
        return {"func": self.held.func, "args": self.held.args, "keywords": self.held.keywords}

    def put(self, items: dict[str, object]) -> None:
        """Set them where any differs."""
        if not self.same(items):
            self.held.__setstate__((*items.values(), self.held.__dict__ or None))


class ContextValue(Held):
    """The value of a context variable in the context of this thread or task."""

    __slots__ = ()

    def __init__(self, held: ContextVar[object]) -> None:
        super().__init__(held)

    def get(self) -> list[object]:
        """One item, or none where it is not set and has no default."""
        try:
            return [self.held.get()]
        except LookupError:
            return []

    def put(self, items: list[object]) -> None:
        """Set it; one that had no value keeps the one it has, since context variables cannot be unset."""
        if items and not self.same(items):
            self.held.set(items[0])


class SelectedItems(Held):
    """Some names of a dictionary, such as the globals that a function uses."""

    __slots__ = ("names",)

    def __init__(self, held: dict[str, object], names: tuple[str, ...]) -> None:
        super().__init__(held)
        self.names = names

    def get(self) -> dict[str, object]:
        """Those that are there."""
        held = self.held
        return {name: held[name] for name in self.names if name in held}

    def put(self, items: dict[str, object]) -> None:
        """Set or remove these names, and no others."""
        for name in self.names:
            if name not in items:
                # A module that was imported meanwhile stays: Python would not import it again.
                if not isinstance(self.held.get(name), ModuleType):
                    self.held.pop(name, None)
            elif self.held.get(name, _MISSING) is not items[name]:
                self.held[name] = items[name]


class Attributes(Held):
    """Some attributes of an object without a dictionary (`__slots__`), or of a class itself."""

    __slots__ = ("names",)

    def __init__(self, held: object, names: tuple[str, ...]) -> None:
        super().__init__(held)
        self.names = names

    def get(self) -> dict[str, object]:
        """Those that are set."""
        if isinstance(self.held, type):
            # Not what a class inherits, and a descriptor itself rather than what it gives.
            own = vars(self.held)
            return {name: own[name] for name in self.names if name in own}
        found = {name: getattr(self.held, name, _MISSING) for name in self.names}
        return {name: value for name, value in found.items() if value is not _MISSING}

    def put(self, items: dict[str, object]) -> None:
        """Set or remove these, past any `__setattr__` that a frozen class defines."""
        assign, remove = (
            (type.__setattr__, type.__delattr__)
            if isinstance(self.held, type)
            else (object.__setattr__, object.__delattr__)
        )
        found = self.get()
        for name in self.names:
            now = found.get(name, _MISSING)
            if name in items:
                if now is not items[name]:
                    assign(self.held, name, items[name])
            elif now is not _MISSING:
                remove(self.held, name)
