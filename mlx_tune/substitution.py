"""Other classes for modules that are there already: how a method of one module is replaced, and of no other.

Python looks `__call__` and its like up on the class, so a module that is to behave otherwise is given a subclass of
its own class. The rest of the module stays as it is, and other instances of its class do not notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

#: The attribute of the classes made here that holds the class which they stand in for.
_PLAIN = "_substituted_class"


class Substitute:
    """The base that comes first in the classes made here."""

    __slots__ = ()

    def __init_subclass__(cls, **_: object) -> None:
        """Say nothing to a class that notes its subclasses, say under their names, or asks something of them."""


def subclass(plain: type, methods: Mapping[str, object], first: type = Substitute) -> type:
    """A subclass that passes for its class, under the same name, but for some methods.

    Args:
        plain: The class.
        methods: Functions by name.
        first: The base that comes before the class: `Substitute`, or a subclass that marks those of one kind.

    Raises:
        TypeError: The class cannot be subclassed.

    Examples:
        >>> import mlx.nn as nn
        >>> class Greeting(nn.Module):
        ...     def __call__(self):
        ...         return "hello"
        >>> loud = subclass(Greeting, {"__call__": lambda self: Greeting.__call__(self).upper()})
        >>> greeting = Greeting()
        >>> with substituted([(greeting, loud)]):
        ...     greeting()
        'HELLO'
        >>> greeting(), plain_class(loud) is Greeting
        ('hello', True)
    """
    bases = (plain,) if issubclass(plain, first) else (first, plain)
    passing = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    made: type = type(plain)(plain.__name__, bases, {**passing, "__slots__": (), **methods, _PLAIN: plain})
    return made


def plain_class(kind: type) -> type:
    """The class that one stands in for; itself where it was not made here."""
    plain: type = vars(kind).get(_PLAIN, kind)
    return plain


def is_substitute(kind: type) -> bool:
    """True for a class that was made here. Its subclasses do not count."""
    return _PLAIN in vars(kind)


def substitute(thing: object, kind: type) -> None:
    """Give a module another class, past any `__setattr__` of its own.

    Raises:
        TypeError: Python cannot give it that class.
    """
    object.__setattr__(thing, "__class__", kind)


@contextmanager
def substituted(pairs: Iterable[tuple[object, type]]) -> Iterator[None]:
    """Give modules other classes for the body; each has its own again afterwards.

    Args:
        pairs: Modules and their classes, which may be made while they are asked for. Of a module that comes twice the
            first class counts.
    """
    changed: dict[int, tuple[object, type]] = {}
    try:
        for thing, kind in pairs:
            if id(thing) not in changed:
                changed[id(thing)] = thing, type(thing)
                substitute(thing, kind)
        yield
    finally:
        for thing, kind in reversed(changed.values()):
            substitute(thing, kind)
