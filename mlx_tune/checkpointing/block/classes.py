"""Classes for modules that are called in another way: one for each class, which can be pickled and copied."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import wraps
from typing import Any, cast
from weakref import WeakValueDictionary

import mlx.nn as nn

from mlx_tune.errors import CheckpointError
from mlx_tune.substitution import Substitute, plain_class, subclass, substitute

#: Calls a module: its plain way of being called, itself, and the arguments.
Caller = Callable[[Callable[..., object], nn.Module, tuple[object, ...], dict[str, object]], object]


class Wrapping:
    """A way to call modules other than their own.

    Args:
        marker: The base by which modules that are called so are known.
        caller: The way.
        word: A participle for errors, such as "checkpointed".
        new: A function that can be found by its name, and hands on to `new` here: it is what pickles hold.
    """

    def __init__(self, marker: type[Substitute], caller: Caller, word: str, new: Callable[..., object]) -> None:
        self._marker, self._caller, self._word, self._new = marker, caller, word, new
        self._classes: WeakValueDictionary[type, type] = WeakValueDictionary()

    def put_on(self, module: nn.Module) -> None:
        """Give a module the class.

        Raises:
            CheckpointError: It cannot have another, or its class cannot be subclassed.
        """
        kind = self.class_of(type(module))
        try:
            substitute(module, kind)
        except TypeError as error:
            raise CheckpointError(
                f"{type(module).__name__} cannot be {self._word}: its instances cannot change class ({error}). "
                f"Have a module {self._word} that calls it."
            ) from error

    def take_off(self, module: nn.Module, *attributes: str) -> bool:
        """Give a module the class that it had, and remove what was noted on it; false where there is nothing to undo.

        It is the outermost way to call the module that goes.
        """
        if not isinstance(module, self._marker):
            return False
        substitute(module, plain_class(type(module)))
        for name in attributes:
            vars(module).pop(name, None)
            module.pop(name, None)
        return True

    def class_of(self, plain: type) -> type:
        """The class that stands in for one."""
        found = self._classes.get(plain)
        if found is not None:
            return found
        call, new = self._caller, self._new

        def __call__(self: nn.Module, *args: object, **kwargs: object) -> object:  # noqa: N807
            return call(super(kind, self).__call__, self, args, kwargs)  # type: ignore[misc]

        def __reduce_ex__(self: nn.Module, protocol: int) -> object:  # noqa: N807
            # The subclass cannot be found by its name, so what is written down is how to make it from the plain one.
            made, *rest = super(kind, self).__reduce_ex__(max(2, protocol))  # type: ignore[misc]
            if made is copyreg.__newobj__ and rest[0][0] is kind:  # type: ignore[attr-defined]
                return (new, (plain, *rest[0][1:]), *rest[1:])
            return (made, *rest)

        methods = {"__call__": wraps(plain.__call__)(__call__), "__reduce_ex__": __reduce_ex__}
        kind: Any
        try:
            kind = subclass(plain, methods, self._marker)
        except TypeError as error:
            raise CheckpointError(
                f"{plain.__name__} cannot be {self._word}: it cannot be subclassed ({error}). "
                f"Have a module {self._word} that calls it."
            ) from error
        self._classes[plain] = kind
        return cast(type, kind)

    def new(self, plain: type, *args: object) -> object:
        """A module of the class, made as pickle makes them."""
        kind = self.class_of(plain)
        return kind.__new__(kind, *args)
