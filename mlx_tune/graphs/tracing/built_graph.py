"""The graph behind lazy arrays, as it was built: which operations there are, and what they read and make.

`mx.export_to_dot` writes it down without shapes, and without evaluating anything. It takes names for 1024 arrays at
most, so arrays are found another way: by an operation that reads them all, in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

import mlx.core as mx

from mlx_tune.upstream import drawing, operations_in


class BuiltNode(NamedTuple):
    """One operation: its primitive's name, and the arrays it reads and makes."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class BuiltGraph:
    """Operations and the names of the arrays between them, which are numbers from 0 up.

    Args:
        inputs: Arrays where the graph begins.
        outputs: Arrays whose operations are wanted.
        others: Arrays whose names are wanted, if they are in the graph.

    Attributes:
        inputs: Their names; several where one array was given several times.
        outputs: The same.
        others: The same, None for those that are not in the graph.
        nodes: The operations, each after those that it needs.
        count: The number of names.
    """

    def __init__(
        self, inputs: Sequence[mx.array], outputs: Sequence[mx.array], others: Sequence[mx.array] = ()
    ) -> None:
        """Read the graph, once; nothing is evaluated."""
        wanted = mx.depends(mx.array(0.0), [*inputs, *outputs])
        last = mx.depends(wanted, list(others))
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        number, nodes = numbers.__getitem__, list[BuiltNode]()
        for name, read, made in operations_in(drawing(last)):
            nodes.append(BuiltNode(name, tuple(map(number, read)), tuple(map(number, made))))
        self.count = len(numbers)
        # The walk is depth first: whatever comes after the operation on the wanted arrays, only the others need.
        beyond = nodes.pop()
        end = next(i for i, node in enumerate(nodes) if node.outputs == beyond.inputs[:1])
        self.nodes = nodes[:end]
        ends = nodes[end].inputs[1:]
        self.inputs, self.outputs = ends[: len(inputs)], ends[len(inputs) :]
        known = set(ends)
        if others:
            known.update(*(node.inputs for node in self.nodes), *(node.outputs for node in self.nodes))
        self.others = [name if name in known else None for name in beyond.inputs[1:]]


def made_by_operations(arrays: Iterable[mx.array]) -> set[int]:
    """Those of some arrays that an operation makes when they are evaluated, by identity; the others are there already.

    Args:
        arrays: Any arrays; nothing of them is evaluated.
    """
    arrays = list(arrays)
    built = BuiltGraph([], arrays)
    made = {name for node in built.nodes for name in node.outputs}
    return {id(array) for array, name in zip(arrays, built.outputs, strict=True) if name in made}
