"""Walking what a step changes: modules, optimizers, dictionaries, lists and tuples, in any nesting, cycles included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def children(node: Any) -> Iterator[Any]:
    """The members of one node: values of a dictionary or module, items of a list or tuple, an optimizer's state.

    Args:
        node: Anything; most things have no members.

    Examples:
        >>> list(children({"a": 1, "b": [2]}))
        [1, [2]]
    """
    if isinstance(node, dict):
        yield from node.values()
    elif isinstance(node, (list, tuple)):
        yield from node
    elif isinstance(getattr(node, "state", None), dict):  # an optimizer
        yield node.state


def walk(tree: Any, below: Callable[[Any], Iterator[Any]] = children) -> Iterator[Any]:
    """A tree and everything in it: each container once, before its members; arrays and values as often as they occur.

    Args:
        tree: Any nesting; one that contains itself has an end all the same.
        below: The members of a node; those that have any are entered once.

    Examples:
        >>> state = [1, (2, 3)]
        >>> state.append(state)
        >>> [node for node in walk(state) if isinstance(node, int)]
        [1, 2, 3]
    """
    seen: dict[int, Any] = {}  # kept, so that no other object gets the identity of one that was made on the way
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        members = list(below(node))
        if members:
            seen[id(node)] = node
        yield node
        waiting.extend(reversed(members))


def arrays_of(tree: Any) -> Iterator[Any]:
    """Every array in a nesting of modules, optimizers, dictionaries, lists and tuples.

    Examples:
        >>> import mlx.core as mx
        >>> len(list(arrays_of({"a": [mx.zeros(2), 3], "b": (mx.zeros(1), None)})))
        2
    """
    import mlx.core as mx

    return (node for node in walk(tree) if isinstance(node, mx.array))
