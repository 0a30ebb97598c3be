"""The graph as the step built it, before MLX's exporter simplified it.

The exporter merges equal operations and drops no-ops, as `mx.compile` does. A step that is not compiled evaluates
every operation it built. `mx.export_to_dot` shows that graph, but without shapes; walking both from the outputs
gives each operation its counterpart, and with it its shapes and arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_tune.graphs.graph import Graph, Node, Value

_NODE = re.compile(r'\{ (\d+) \[label ="([^"]*)", shape=rectangle\]; \}')
_INPUT = re.compile(r'"([^"]+)" -> \d+')
_OUTPUT = re.compile(r'\d+ -> "([^"]+)"')
_MOST_NAMES = 1000
_NOOPS = frozenset({"Copy", "StopGradient"})


@dataclass
class _Built:
    name: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


class BuiltGraph:
    """The operations as they were built: names and connections only."""

    def __init__(self, inputs: list[mx.array], outputs: list[mx.array]) -> None:
        names: dict[int, str] = {id(a): f"in{i}" for i, a in enumerate(inputs)}
        for i, a in enumerate(outputs):
            names.setdefault(id(a), f"out{i}")
        by_name = {names[id(a)]: a for a in [*inputs, *outputs]}
        self.inputs = [names[id(a)] for a in inputs]
        self.outputs = [names[id(a)] for a in outputs]
        self.nodes: list[_Built] = []
        for kind, token in _described(by_name):
            if kind == "node":
                self.nodes.append(_Built(token))
            elif kind == "input":
                self.nodes[-1].inputs.append(token)
            else:
                self.nodes[-1].outputs.append(token)


def made_by_operations(arrays: Iterable[mx.array]) -> set[int]:
    """Those of some arrays that an operation makes when they are evaluated, by identity; the others are there already.

    Args:
        arrays: Any arrays; nothing of them is evaluated.
    """
    arrays = list(arrays)
    built = BuiltGraph([], arrays)
    made = {name for node in built.nodes for name in node.outputs}
    return {id(array) for array, name in zip(arrays, built.outputs, strict=True) if name in made}


def _described(by_name: dict[str, mx.array]) -> list[tuple[str, str]]:
    """The operations with what they read and make, the named arrays under their names.

    MLX takes the names as keyword arguments, of which there can be 1024 at most: a model of 28 layers has thousands.
    So the graph is written several times, with some of the names each time. All arrays are given by position too,
    which makes every writing the same but for the names.
    """
    arrays, names = list(by_name.values()), list(by_name)
    first: list[tuple[str, str]] = []
    named: dict[str, str] = {}
    for start in range(0, max(1, len(names)), _MOST_NAMES):
        some = {name: by_name[name] for name in names[start : start + _MOST_NAMES]}
        text: list[str] = []
        mx.export_to_dot(_Writer(text), arrays, **some)
        tokens = _tokens("".join(text))
        first = first or tokens
        named |= {
            old: new for (kind, old), (_, new) in zip(first, tokens, strict=True) if kind != "node" and new in some
        }
    return [(kind, token if kind == "node" else named.get(token, token)) for kind, token in first]


def _tokens(text: str) -> list[tuple[str, str]]:
    """Operations, and the names of their inputs and outputs, in the order of the text."""
    found = []
    for line in text.splitlines():
        if match := _NODE.match(line):
            found.append(("node", match[2]))
        elif match := _INPUT.match(line):
            found.append(("input", match[1]))
        elif match := _OUTPUT.match(line):
            found.append(("output", match[1]))
    return found


class _Writer:
    def __init__(self, text: list[str]) -> None:
        self.write = text.append


def unmerge(simplified: Graph, built: BuiltGraph) -> Graph | None:
    """Give the built graph the shapes and arguments of the simplified one.

    Args:
        simplified: What the exporter reported.
        built: The same trace before it was simplified.

    Returns:
        The graph with every operation that the step built, or None where the two do not match.
    """
    made_by = {name: i for i, node in enumerate(built.nodes) for name in node.outputs}
    producers = simplified.producers()
    input_values = [i for i, value in enumerate(simplified.values) if value.role not in ("made", "captured")]
    counterpart: dict[str, int] = dict(zip(built.inputs, input_values, strict=False))
    partner: dict[int, int] = {}
    waiting = list(zip(built.outputs, simplified.outputs, strict=True))
    while waiting:
        name, value = waiting.pop()
        if name in counterpart:
            if counterpart[name] != value:
                return None
            continue
        counterpart[name] = value
        index = made_by.get(name)
        if index is None:
            continue
        node = built.nodes[index]
        if node.name in _NOOPS:
            waiting.append((node.inputs[0], value))
            continue
        if value not in producers:
            return None
        if index in partner:
            if partner[index] != producers[value]:
                return None
            continue
        partner[index] = producers[value]
        other = simplified.nodes[producers[value]]
        if len(other.inputs) != len(node.inputs) or len(other.outputs) != len(node.outputs):
            return None
        counterpart |= {o: v for o, v in zip(node.outputs, other.outputs, strict=True) if o != name}
        waiting.extend(zip(node.inputs, other.inputs, strict=True))
    return _assemble(simplified, built, counterpart, partner)


def _assemble(simplified: Graph, built: BuiltGraph, counterpart: dict[str, int], partner: dict[int, int]) -> Graph:
    graph = Graph(compiled=simplified.compiled, results=simplified.results, stand_ins=simplified.stand_ins)
    index: dict[str, int] = {}
    inputs = set(built.inputs)
    made = {name for node in built.nodes for name in node.outputs} - inputs

    def place(name: str) -> int:
        if name not in index:
            value = simplified.values[counterpart[name]]
            if name in made and value.role != "made":
                value = Value(value.shape, value.dtype)  # a no-op on an input: another name for it
            index[name] = len(graph.values)
            graph.values.append(value)
            if value.role == "captured" or (name in inputs and counterpart[name] in simplified.held):
                graph.held.add(index[name])
        return index[name]

    for name in built.inputs:
        place(name)
    for i, node in enumerate(built.nodes):
        if node.outputs[0] in inputs or any(o not in counterpart for o in node.outputs):
            continue
        if i in partner:
            other = simplified.nodes[partner[i]]
            name, arguments = other.name, other.arguments
        elif node.name in _NOOPS:
            name, arguments = node.name, ()
        else:
            continue
        graph.nodes.append(Node(name, tuple(map(place, node.inputs)), tuple(map(place, node.outputs)), arguments))
    graph.outputs = [place(name) for name in built.outputs]
    return graph
