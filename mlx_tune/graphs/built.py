"""The graph behind lazy arrays, as it was built: which operations there are, and what they read and make.

`mx.export_to_dot` writes it down without shapes, and without evaluating anything. It takes names for 1024 arrays at
most, so arrays are found another way: by an operation that reads them all, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

#: What a line is about: an array that an operation reads, `"A" -> 123`, one that it makes, `123 -> "A"`, or the
#: operation itself, `{ 123 [label ="Add", shape=rectangle]; }`.
_LINE = re.compile(r'^"(\w+)" -> |^\d+ -> "(\w+)"|^{ \d+ \[label ="([^"]*)"', re.MULTILINE)


@dataclass(slots=True)
class BuiltNode:
    """One operation: its primitive's name, and the arrays it reads and makes."""

    name: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


class BuiltGraph:
    """Operations and the names of the arrays between them.

    Args:
        inputs: Arrays where the graph begins.
        outputs: Arrays whose operations are wanted.
        others: Arrays whose names are wanted, if they are in the graph.

    Attributes:
        inputs: Their names; several where one array was given several times.
        outputs: The same.
        others: The same, None for those that are not in the graph.
        nodes: The operations, each after those that it needs.
    """

    def __init__(
        self, inputs: Sequence[mx.array], outputs: Sequence[mx.array], others: Sequence[mx.array] = ()
    ) -> None:
        """Read the graph, once; nothing is evaluated."""
        wanted = mx.depends(mx.array(0.0), [*inputs, *outputs])
        last = mx.depends(wanted, list(others))
        text: list[str] = []
        mx.export_to_dot(_Writer(text), last)
        nodes: list[BuiltNode] = []
        for read, made, name in _LINE.findall("".join(text)):
            if read:
                nodes[-1].inputs.append(read)
            elif made:
                nodes[-1].outputs.append(made)
            else:
                nodes.append(BuiltNode(name))
        # The walk is depth first: whatever comes after the operation on the wanted arrays, only the others need.
        beyond = nodes.pop()
        end = next(i for i, node in enumerate(nodes) if node.outputs == beyond.inputs[:1])
        self.nodes = nodes[:end]
        names = nodes[end].inputs[1:]
        self.inputs, self.outputs = names[: len(inputs)], names[len(inputs) :]
        known = set(names).union(*(node.inputs for node in self.nodes), *(node.outputs for node in self.nodes))
        self.others = [name if name in known else None for name in beyond.inputs[1:]]


class _Writer:
    def __init__(self, text: list[str]) -> None:
        self.write = text.append


def made_by_operations(arrays: Iterable[mx.array]) -> set[int]:
    """Those of some arrays that an operation makes when they are evaluated, by identity; the others are there already.

    Args:
        arrays: Any arrays; nothing of them is evaluated.
    """
    arrays = list(arrays)
    built = BuiltGraph([], arrays)
    made = {name for node in built.nodes for name in node.outputs}
    return {id(array) for array, name in zip(arrays, built.outputs, strict=True) if name in made}
