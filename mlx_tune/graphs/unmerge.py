"""The graph as the step built it, before MLX's exporter simplified it.

The exporter merges equal operations and drops no-ops, as `mx.compile` does. A step that is not compiled evaluates
every operation it built. Walking both graphs from the outputs gives each operation its counterpart, and with it its
shapes and arguments.
"""

from __future__ import annotations

from mlx_tune.graphs.built import BuiltGraph
from mlx_tune.graphs.graph import NOOPS, Graph, Node, Part, Value

Names = tuple[list[str | None], list[str | None]]


def unmerge(simplified: Graph, built: BuiltGraph, parts: list[Names]) -> Graph | None:
    """Give the built graph the shapes and arguments of the simplified one.

    Args:
        simplified: The exporter's report.
        built: The same trace before it was simplified.
        parts: Arrays that compiled functions read and made, by the names of `built`.

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
        if node.name in NOOPS:
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
    return _assemble(simplified, built, counterpart, partner, parts)


def _assemble(
    simplified: Graph, built: BuiltGraph, counterpart: dict[str, int], partner: dict[int, int], parts: list[Names]
) -> Graph:
    graph = Graph(compiled=simplified.compiled, results=simplified.results, updated=simplified.updated)
    graph.stand_ins = simplified.stand_ins
    index: dict[str, int] = {}
    inputs = set(built.inputs)
    made = {name for node in built.nodes for name in node.outputs} - inputs
    constants: dict[int, int] = {}

    def place(name: str) -> int:
        if name not in index:
            value = simplified.values[counterpart[name]]
            if name in made and value.role != "made":
                value = Value(value.shape, value.dtype)  # a no-op on an input: another name for it
            index[name] = len(graph.values)
            graph.values.append(value)
            if counterpart[name] in simplified.marks:
                graph.marks[index[name]] = simplified.marks[counterpart[name]]
            if value.role == "captured":
                graph.twins[index[name]] = constants.setdefault(counterpart[name], index[name])
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
        elif node.name in NOOPS:
            name, arguments = node.name, ()
        else:
            continue
        graph.nodes.append(Node(name, tuple(map(place, node.inputs)), tuple(map(place, node.outputs)), arguments))
    graph.outputs = [place(name) for name in built.outputs]
    graph.parts = [Part(*(tuple(index[n] for n in names if n in index) for names in part)) for part in parts]
    return graph
