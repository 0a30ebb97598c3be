"""Facts of code and classes, found once and kept as long as they live."""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import ref

T = TypeVar("T")


class Facts(dict[int, T]):
    """Facts of objects, each under its `id`, and forgotten with it.

    A `WeakKeyDictionary` compares: code objects of the same text would be one, and each look-up would make a
    reference.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}

    def learn(self, thing: Any, fact: T) -> T:
        """Remember, and give it back. The fact must not refer to the thing, or it is never forgotten."""
        key = id(thing)
        self._alive[key] = ref(thing, lambda _: self._forget(key))
        self[key] = fact
        return fact

    def _forget(self, key: int) -> None:
        self.pop(key, None)
        self._alive.pop(key, None)
