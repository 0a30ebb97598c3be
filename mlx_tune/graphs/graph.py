"""The graph of a traced step: values with shapes, and the operations that make them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx


class Value(NamedTuple):
    """One array of the graph.

    `role` is "parameter", "optimizer", "batch", "state", "captured" or, for what an operation makes, "made";
    `label` is where it came from: a parameter's path, an argument's place.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    role: str = "made"
    label: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes when every element is stored."""
        return prod(self.shape) * self.dtype.size


class Node(NamedTuple):
    """One operation: its primitive's name and arguments, and the values it reads and makes, by their indices."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: tuple[Any, ...] = ()


#: Operations that only give their input another name; the exporter drops them.
NOOPS = frozenset({"Copy", "StopGradient"})


@dataclass(frozen=True, slots=True)
class CompiledCall:
    """The arrays that one call of a compiled function reads and makes."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Mark:
    """One number: which end of which call it marks, and the shape and dtype of the array that belongs there.

    A kernel's has its primitive's name as well.
    """

    end: str
    call: int
    position: int
    shape: tuple[int, ...]
    dtype: mx.Dtype
    primitive: str = ""


@dataclass
class Graph:
    """A step: all values, the operations in an order in which they could run, and what is evaluated at its end.

    The first `results` of the outputs are what the step returned, the rest is updated state: new values of the places
    in it that `updated` names. `held` are the values that something outside the step keeps alive for its whole
    duration: the batch, frozen parameters, captured arrays. `compiled` tells that `mx.compile` fuses the step in
    earnest, or `compiled_calls` in it; `twins` has for captured scalars the first that is equal; `marks` says which
    values mark the ends of custom gradients.
    """

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    results: int = 0
    updated: list[str] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    compiled: bool = False
    stand_ins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    compiled_calls: list[CompiledCall] = field(default_factory=list)
    twins: dict[int, int] = field(default_factory=dict)
    marks: dict[int, Mark] = field(default_factory=dict)

    def producers(self) -> dict[int, int]:
        """Which node makes each made value."""
        return {v: n for n, node in enumerate(self.nodes) for v in node.outputs}

    def rename(self, names: dict[int, int]) -> None:
        """Read other values in the place of some; what they are renamed to may be renamed itself."""

        def new(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(map(latest, values))

        def latest(value: int) -> int:
            while value in names:
                value = names[value]
            return value

        self.nodes = [Node(n.name, new(n.inputs), n.outputs, n.arguments) for n in self.nodes]
        self.outputs = list(new(tuple(self.outputs)))
        self.compiled_calls = [CompiledCall(new(call.inputs), new(call.outputs)) for call in self.compiled_calls]

    def sort(self) -> None:
        """Put the operations in an order in which they could run: each after those that make what it reads."""
        made_by, order, seen = self.producers(), list[Node](), set[int]()
        for first in range(len(self.nodes)):
            stack = [(first, False)]
            while stack:
                i, ready = stack.pop()
                if ready:
                    order.append(self.nodes[i])
                elif i not in seen:
                    seen.add(i)
                    stack.append((i, True))
                    stack.extend((made_by[v], False) for v in reversed(self.nodes[i].inputs) if v in made_by)
        self.nodes = order

    def drop_unneeded(self) -> None:
        """Forget operations that no output needs, and captured arrays that only those read."""
        made_by = self.producers()
        needed: set[int] = set()
        waiting = list(self.outputs)
        while waiting:
            node = made_by.get(waiting.pop())
            if node is not None and node not in needed:
                needed.add(node)
                waiting.extend(self.nodes[node].inputs)
        self.nodes = [node for i, node in enumerate(self.nodes) if i in needed]
        read = {value for node in self.nodes for value in node.inputs}.union(self.outputs)
        self.held = {v for v in self.held if v in read or self.values[v].role != "captured"}

    def inputs(self) -> Iterator[int]:
        """The values that exist before the step."""
        return (i for i, value in enumerate(self.values) if value.role != "made")
