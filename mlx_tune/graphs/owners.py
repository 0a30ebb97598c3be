"""Which module an array of a step belongs to, as far as the graph tells.

The graph does not say whose code made an operation, but parameters have paths: an operation that reads the weight of
`layers.3.mlp.up_proj` is that layer's, and what is computed from its result alone is told under the same path. Where
several modules come together it is the path that they share. A gradient belongs to the parameter that it updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from mlx_tune.graphs.graph import Graph, Node

# What reads a parameter and is still that parameter: views, casts and other names.
_VIEWS = """
Transpose Reshape Flatten Unflatten Squeeze ExpandDims Broadcast BroadcastAxes AsType Slice Split AsStrided View
Contiguous Copy StopGradient
"""
_SAME = frozenset(_VIEWS.split())
# What an optimizer does to a gradient, element by element.
_ARITHMETIC = """
Add Subtract Multiply Divide Power Square Sqrt Sign Maximum Minimum Negative Abs Select AsType Compiled Broadcast
Reshape Transpose Copy StopGradient
"""
_ELEMENTWISE = frozenset(_ARITHMETIC.split())


def modules_of(graph: Graph, order: Sequence[int]) -> dict[int, str]:
    """The paths of the modules that the values of a graph belong to.

    Args:
        graph: The step.
        order: Its nodes, each after those that it needs.

    Returns:
        For each value that can be told the path of its module.
    """
    module: dict[int, str] = {}
    parameters: set[int] = set()
    for value in graph.inputs():
        described = graph.values[value]
        if described.role == "parameter":
            module[value] = described.label.rpartition(".")[0]
            parameters.add(value)
    for index in order:
        node = graph.nodes[index]
        read = [v for v in node.inputs if v in parameters]
        told = read or [v for v in node.inputs if v in module and graph.values[v].shape]
        same = node.name in _SAME or node.name == "Depends"
        for out, sources in _sources(node, told):
            if paths := {module[v] for v in sources if v in module}:
                module[out] = _shared(frozenset(paths)) if len(paths) > 1 else paths.pop()
            if same and sources and parameters.issuperset(sources):
                parameters.add(out)
    return module | _gradients(graph)


def _sources(node: Node, told: list[int]) -> list[tuple[int, list[int]]]:
    """For each output the inputs that say what it belongs to."""
    if node.name == "Depends":  # each output is one of the inputs
        return [(out, [value]) for out, value in zip(node.outputs, node.inputs, strict=False)]
    if node.name == "CustomTransforms":  # the outputs are the last inputs
        values = node.inputs[len(node.inputs) - len(node.outputs) :]
        return [(out, [value]) for out, value in zip(node.outputs, values, strict=True)]
    return [(out, told) for out in node.outputs]


@lru_cache(4096)
def _shared(paths: frozenset[str]) -> str:
    """The path that some paths begin with."""
    parts = [path.split(".") for path in sorted(paths)]
    same = 0
    while all(len(p) > same for p in parts) and len({p[same] for p in parts}) == 1:
        same += 1
    return ".".join(parts[0][:same])


def _gradients(graph: Graph) -> dict[int, str]:
    """Arrays that lead to the new value of one parameter and have its shape: its update, before that its gradient."""
    made_by = graph.producers()
    parameters = {graph.values[v].label for v in graph.inputs() if graph.values[v].role == "parameter"}
    found: dict[int, str] = {}
    for out, label in zip(graph.outputs[graph.results :], graph.updated, strict=True):
        shape, waiting = graph.values[out].shape, [out] if label in parameters else []
        sizes = sorted(shape)
        while waiting:
            value = waiting.pop()
            if value in found or value not in made_by:
                continue
            if graph.values[value].shape != shape and sorted(graph.values[value].shape) != sizes:
                continue
            found[value] = label.rpartition(".")[0]
            node = graph.nodes[made_by[value]]
            if node.name in _ELEMENTWISE:
                waiting.extend(node.inputs)
            elif node.name in ("Depends", "CustomTransforms"):
                waiting.extend(dict(_sources(node, []))[value])
    return found
