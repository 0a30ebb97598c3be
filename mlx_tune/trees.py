"""The one walk through what a step changes: modules, optimizers, dictionaries, lists and tuples, in any nesting.

Everybody who counts, evaluates, keeps, traces or wires a state stands on it, so that all find the same arrays:

- dictionaries and modules: their values, then the attributes that a module keeps beside them;
- lists and tuples: their items;
- optimizers: all their attributes, so that one inside another is found, too;
- other objects with a dictionary named `state`: that dictionary. Other attributes of other objects are not looked at.

Each container is entered once, also where it contains itself. Arrays come as often as they occur: `arrays_once` and
`nbytes_of` count those that are shared once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import mlx.core as mx

T = TypeVar("T")

#: What has members; of these a tuple cannot be written to.
Holder = dict[object, object] | list[object] | tuple[object, ...]

#: Most of what there is in a list of tokens.
_PLAIN = frozenset({int, float, str, bool, bytes, type(None)})


class Entry:
    """A node of a tree, with its place.

    Attributes:
        node: The node.
        holder: Its holder; None for the tree itself.
        key: Where in that.
        above: The entry of the module, optimizer or container that it was reached through; None for the tree itself.
    """

    __slots__ = ("above", "holder", "key", "node")

    def __init__(
        self, node: object, holder: Holder | None = None, key: object = None, above: Entry | None = None
    ) -> None:
        """Note where a node stands."""
        self.node, self.holder, self.key, self.above = node, holder, key, above


class StateArray:
    """A place in a step's state that holds an array.

    Attributes:
        holder: The dictionary or list that holds it.
        key: Where in that.
        array: The array, of any shape and dtype.
        role: "parameter" in a module, "optimizer" in an optimizer, else "state".
        label: Its path, in a module as the module names it.
    """

    __slots__ = ("array", "holder", "key", "label", "role")

    def __init__(
        self, holder: dict[object, object] | list[object], key: Any, array: mx.array, role: str, label: str
    ) -> None:
        """Note where an array stands."""
        self.holder, self.key, self.array, self.role, self.label = holder, key, array, role, label

    def put(self, array: mx.array) -> None:
        """Hold another array there."""
        if isinstance(self.holder, dict):
            dict.__setitem__(self.holder, self.key, array)
        else:
            self.holder[self.key] = array


def holders(node: Any) -> list[Holder]:
    """The containers that a node is made of: itself, and the dictionary of its attributes.

    Args:
        node: A module, an optimizer, a container, an array or a plain value.

    Returns:
        None for an array or a plain value; one for a list, a tuple, a dictionary or an optimizer; two for a module: its
        items, and its attributes.

    Examples:
        >>> holders([1, 2]), holders(3)
        ([[1, 2]], [])
    """
    if type(node) in _PLAIN:
        return []
    if isinstance(node, (list, tuple)):
        return [node]
    attributes = getattr(node, "__dict__", None)
    if isinstance(node, dict):
        return [node] if attributes is None else [node, attributes]
    if _is_optimizer(node):
        return [vars(node)]
    state = getattr(node, "state", None)
    return [state] if isinstance(state, dict) else []


def _is_optimizer(node: object) -> bool:
    optimizers = sys.modules.get("mlx.optimizers")  # where nobody has imported them, there is none
    return optimizers is not None and isinstance(node, optimizers.Optimizer)


def entries(tree: object, stop: type | tuple[type, ...] = ()) -> Iterator[Entry]:
    """A tree and everything in it, with places: each container once, before its members, in order.

    Args:
        tree: Any nesting; one that contains itself has an end all the same.
        stop: Nodes of these classes are not entered.

    Returns:
        Entries, as they are asked for; arrays, of whatever shape, and values as often as they occur.
    """
    seen: dict[int, object] = {}  # kept, so that no other object gets the identity of one that was made on the way
    waiting = [iter([Entry(tree)])]
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
            continue
        node = entry.node
        if id(node) in seen:
            continue
        held = holders(node)
        if held:
            seen[id(node)] = node
        yield entry
        if held and not isinstance(node, stop):
            fresh = [holder for holder in held if holder is node or id(holder) not in seen]
            seen.update((id(holder), holder) for holder in fresh)
            waiting.append(_members(entry, fresh))


def _members(above: Entry, held: list[Holder]) -> Iterator[Entry]:
    for holder in held:
        for key, child in holder.items() if isinstance(holder, dict) else enumerate(holder):
            yield Entry(child, holder, key, above)


def walk(tree: object, stop: type | tuple[type, ...] = ()) -> Iterator[Any]:
    """A tree and everything in it: each container once, before its members; arrays and values as often as they occur.

    Args:
        tree: Any nesting; one that contains itself has an end all the same.
        stop: Nodes of these classes are not entered.

    Examples:
        >>> state = [1, (2, 3)]
        >>> state.append(state)
        >>> [node for node in walk(state) if isinstance(node, int)]
        [1, 2, 3]
    """
    return (entry.node for entry in entries(tree, stop))


def outermost(tree: object, kind: type[T]) -> list[T]:
    """The nodes of a class that are in no other node of that class.

    Examples:
        >>> outermost({"a": 1, "b": ("c", 2)}, int)
        [1, 2]
    """
    return [node for node in walk(tree, stop=kind) if isinstance(node, kind)]


def containers_of(tree: object) -> list[dict[Any, Any] | list[Any]]:
    """Every dictionary and list of a tree that can be written to, each once, the outermost first.

    Examples:
        >>> containers_of(({"a": [1]}, 2))
        [{'a': [1]}, [1]]
    """
    found = {id(holder): holder for node in walk(tree) for holder in holders(node) if not isinstance(holder, tuple)}
    return list(found.values())


def arrays_of(tree: object) -> Iterator[mx.array]:
    """Every array of a tree, as often as it occurs.

    Examples:
        >>> import mlx.core as mx
        >>> len(list(arrays_of({"a": [mx.zeros(2), 3], "b": (mx.zeros(1), None)})))
        2
    """
    import mlx.core as mx

    return (node for node in walk(tree) if isinstance(node, mx.array))


def arrays_once(tree: object) -> list[mx.array]:
    """Every array of a tree, of any shape, those that are shared once, such as tied weights; in order of occurrence."""
    return list({id(array): array for array in arrays_of(tree)}.values())


def nbytes_of(tree: object) -> int:
    """The bytes of a tree's arrays, those that are shared once.

    Args:
        tree: Any nesting of modules, optimizers, containers and arrays.

    Returns:
        The sum of `array.nbytes`, 0 without arrays: elements times the bytes of their dtype, without padding.

    Examples:
        >>> import mlx.core as mx
        >>> shared = mx.zeros(10)
        >>> nbytes_of([shared, {"again": shared}])
        40
    """
    return sum(array.nbytes for array in arrays_once(tree))


def state_arrays(state: object) -> Iterator[StateArray]:
    """Every array of a state that can be replaced, with its place, in a fixed order.

    MLX's random stream is none of the state's own, and nothing can be put into a tuple: arrays there are left out.

    Args:
        state: A model, an optimizer, or any nesting of dictionaries, lists and tuples of them.
    """
    import mlx.core as mx
    import mlx.nn as nn

    top = list(state) if isinstance(state, (tuple, list)) else []
    several = sum(isinstance(child, nn.Module) for child in top) > 1
    described: dict[Entry, tuple[str, str]] = {}  # the role and the label of what has members

    def describe(entry: Entry) -> tuple[str, str]:
        role, label = "state", ""
        if entry.above is not None:
            if entry.above not in described:
                described[entry.above] = describe(entry.above)
            role, label = described[entry.above]
            if entry.above.node is state and top:
                label = f"state[{entry.key}]" if several or isinstance(entry.node, mx.array) else ""
            elif not (entry.key == "_state" and _is_optimizer(entry.above.node)):
                label = f"{label}.{entry.key}" if label else str(entry.key)
        if isinstance(entry.node, nn.Module):
            return "parameter", label
        return ("optimizer", label or "optimizer") if _is_optimizer(entry.node) else (role, label)

    for entry in entries(state):
        holder = entry.holder
        if isinstance(entry.node, mx.array) and isinstance(holder, (dict, list)) and holder is not mx.random.state:
            yield StateArray(holder, entry.key, entry.node, *describe(entry))
