"""Other classes for modules that are there already: how a method of one module is replaced, and of no other.

Python looks `__call__` and its like up on the class, so a module that is to behave otherwise is given a subclass of
its own class. The rest of the module stays as it is, and other instances of its class do not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

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


#: Ways in which modules are called; a tied embedding is an output head through the second.
_METHODS = ("__call__", "as_linear")


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Attributes:
        module: The module.
        name: The method that was called: "__call__" or "as_linear".
        arguments: The positional arguments.
        keywords: The arguments by name.
        method: The module's own method, for `run`.
    """

    module: nn.Module
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, object]
    method: Callable[..., object]

    def run(self) -> Any:
        """Call the module itself."""
        return self.method(self.module, *self.arguments, **self.keywords)

    def run_on(self, inputs: mx.array) -> Any:
        """Call the module with another first argument."""
        return self.method(self.module, inputs, *self.arguments[1:], **self.keywords)

    @property
    def inputs(self) -> mx.array | None:
        """The first argument, where that is an array."""
        return self.arguments[0] if self.arguments and isinstance(self.arguments[0], mx.array) else None

    @property
    def experts(self) -> Any:
        """The experts that each input goes to, where the module is a stack of them."""
        return self.arguments[1] if len(self.arguments) > 1 else self.keywords.get("indices")

    @property
    def looks_up(self) -> bool:
        """True where tokens are looked up in an embedding: no product with its weights."""
        return isinstance(self.module, nn.Embedding) and self.name == "__call__"


#: Sees a call, and gives back what it is to give back.
Hook = Callable[[ModuleCall], object]


@contextmanager
def intercepted(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Route every call of these module objects, and of no others, through a hook while the block runs.

    Args:
        modules: The modules; one named twice is intercepted once.
        hook: Called instead of the module.

    Examples:
        >>> seen = []
        >>> layer = nn.Linear(2, 2)
        >>> with intercepted([layer], lambda call: seen.append(call.inputs.shape) or call.run()):
        ...     y = layer(mx.ones((3, 2)))
        >>> seen
        [(3, 2)]
    """
    with substituted((module, _listening(type(module), hook)) for module in modules):
        yield


def _listening(kind: type, hook: Hook) -> type:
    def through(name: str) -> Callable[..., object]:
        method = getattr(kind, name)

        def call(self: Any, *arguments: Any, **keywords: object) -> object:
            return hook(ModuleCall(self, name, arguments, keywords, method))

        return call

    return subclass(kind, {name: through(name) for name in _METHODS if hasattr(kind, name)})
