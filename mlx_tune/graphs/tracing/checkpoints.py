"""Turning checkpoints that a trace wrote out back into what MLX really evaluates."""

from __future__ import annotations

from mlx_tune.graphs.graph import Graph, Node


def fold_checkpoints(graph: Graph) -> int:
    """Replace every written-out checkpoint by the primitive that `mx.checkpoint` makes.

    `traced_checkpoint` returns y + (z - z) next to a Depends on y; MLX makes one CustomTransforms instead, which
    passes y through, and a Depends on its output. The second evaluation stays only where the gradient uses it.

    Args:
        graph: The traced step; changed in place.

    Returns:
        How many checkpoints were found.
    """
    sums = sums_with_nothing(graph)
    rewritten: dict[int, Node | None] = {}
    found = 0
    for i, node in enumerate(graph.nodes):
        if node.name != "Depends" or len(node.inputs) == len(node.outputs):
            continue
        primals, values = node.inputs[: len(node.outputs)], node.inputs[len(node.outputs) :]
        passed = [v for v in values if v in sums]
        if not passed:
            continue
        results = {v: graph.nodes[sums[v]].outputs[0] for v in passed}
        first, *others = sorted(sums[v] for v in passed)
        rewritten[first] = Node("CustomTransforms", (*primals, *passed), tuple(results[v] for v in passed), ())
        found += 1
        rewritten |= dict.fromkeys(others)
        rewritten[i] = Node("Depends", (*primals, *(results.get(v, v) for v in values)), node.outputs, ())
    nodes = (rewritten.get(i, node) for i, node in enumerate(graph.nodes))
    graph.nodes = [node for node in nodes if node is not None]
    return found


def sums_with_nothing(graph: Graph) -> dict[int, int]:
    """For each value y of which a trace made y + (z - z) the node of that sum.

    Args:
        graph: The traced step.
    """
    behind = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.name == "StopGradient"}
    differences = {
        node.outputs[0]
        for node in graph.nodes
        if node.name == "Subtract" and node.inputs[0] == behind.get(node.inputs[1], node.inputs[1])
    }
    sums: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        if node.name == "Add" and node.inputs[1] in differences:
            sums.setdefault(node.inputs[0], i)
    return sums
