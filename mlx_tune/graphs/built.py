"""The graph behind lazy arrays, as it was built: which operations there are, and what they read and make.

`mx.export_to_dot` writes it down without shapes, and without evaluating anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

#: MLX takes names of arrays as keyword arguments, of which there can be 1024 at most.
MOST_NAMES = 1000


@dataclass
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

    Attributes:
        inputs: Their names; several where one array was given several times.
        outputs: The same.
        nodes: The operations, each after those that it needs.
    """

    def __init__(self, inputs: Sequence[mx.array], outputs: Sequence[mx.array]) -> None:
        """Read the graph; nothing is evaluated."""
        self._arrays = [*inputs, *outputs]
        self._tokens = self._written({})
        self.nodes: list[BuiltNode] = []
        for kind, token in self._tokens:
            if kind == "node":
                self.nodes.append(BuiltNode(token))
            elif kind == "input":
                self.nodes[-1].inputs.append(token)
            elif kind == "output":
                self.nodes[-1].outputs.append(token)
        self._known: dict[int, str] = {}
        names = [name or "" for name in self.names_of(self._arrays)]
        self._known = dict(zip(map(id, self._arrays), names, strict=True))
        self.inputs, self.outputs = names[: len(inputs)], names[len(inputs) :]

    def names_of(self, arrays: Sequence[mx.array]) -> list[str | None]:
        """The names of some arrays; None for those that are not in the graph.

        Several Python objects can stand for one array, and MLX writes one of them; then the others are asked again.

        Args:
            arrays: What to look for.
        """
        found = [self._known.get(id(array)) for array in arrays]
        waiting = [i for i, name in enumerate(found) if name is None]
        while waiting:
            for start in range(0, len(waiting), MOST_NAMES):
                named = {f"array {i}": arrays[i] for i in waiting[start : start + MOST_NAMES]}
                # Every writing is the same but for the names, and what only the named arrays need comes last.
                for (_, name), (kind, new) in zip(self._tokens, self._written(named), strict=False):
                    if kind != "node" and new in named:
                        found[int(new.removeprefix("array "))] = name
            still = [i for i in waiting if found[i] is None]
            if len(still) == len(waiting):
                break
            waiting = still
        return found

    def _written(self, named: dict[str, mx.array]) -> list[tuple[str, str]]:
        """Operations, what they read and make, and arrays that are there already, in the order of the text."""
        text: list[str] = []
        mx.export_to_dot(_Writer(text), self._arrays, **named)
        return [token for line in "".join(text).splitlines() if (token := _token(line))]


def _token(line: str) -> tuple[str, str] | None:
    """What a line is about: an operation, an array that one reads or makes, or an array that is there already."""
    if line.startswith('"'):  # "A" -> 123
        return "input", line[1 : line.index('"', 1)]
    if line[:1].isdigit():  # 123 -> "A"
        return "output", line[line.index('"') + 1 : -1]
    if line.startswith("{ rank=source"):  # { rank=source; "A"; }
        return "leaf", line.split('"')[1]
    if line.endswith("shape=rectangle]; }"):  # { 123 [label ="Add", shape=rectangle]; }
        return "node", line.split('"')[1]
    return None


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
