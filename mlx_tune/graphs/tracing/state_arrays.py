"""The arrays of a step's state, each with the place that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx


class StateArray:
    """A place in the state that holds an array.

    Attributes:
        container: The dictionary, list or object that holds it.
        key: Where in that.
        array: The array.
        role: "parameter", "optimizer" or "state".
        label: Its path.
    """

    def __init__(self, container: Any, key: Any, array: mx.array, role: str, label: str) -> None:
        self.container, self.key, self.array, self.role, self.label = container, key, array, role, label

    def put(self, array: mx.array) -> None:
        """Hold another array there."""
        if isinstance(self.container, dict):
            dict.__setitem__(self.container, self.key, array)
        elif isinstance(self.container, list):
            self.container[self.key] = array
        else:
            vars(self.container)[self.key] = array


def state_arrays(state: Any) -> Iterator[StateArray]:
    """Every array in the state, with its place, in a fixed order.

    Args:
        state: A model, an optimizer, or any nesting of dictionaries, lists and tuples of them.
    """
    from mlx.nn import Module
    from mlx.optimizers import Optimizer

    seen: set[int] = set()
    random_state = id(mx.random.state)

    def walk(node: Any, role: str, label: str) -> Iterator[StateArray]:
        if id(node) in seen or id(node) == random_state:
            return
        if isinstance(node, (dict, list, tuple, Optimizer)):
            seen.add(id(node))
        if isinstance(node, Module):
            role = "parameter"
        elif isinstance(node, Optimizer):
            yield from walk(node.state, "optimizer", label or "optimizer")
            return
        items: list[tuple[Any, Any]] = []
        if isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, (list, tuple)):
            items = list(enumerate(node))
        for key, child in items:
            path = f"{label}.{key}" if label else str(key)
            if isinstance(child, mx.array):
                if not isinstance(node, tuple):
                    yield StateArray(node, key, child, role, path)
            else:
                yield from walk(child, role, path)

    top = list(state) if isinstance(state, (tuple, list)) else [state]
    several = sum(isinstance(child, Module) for child in top) > 1
    for i, child in enumerate(top):
        yield from walk(child, "state", f"state[{i}]" if several else "")
