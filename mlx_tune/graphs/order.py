"""The order in which MLX evaluates a graph.

Follows `eval_impl` in mlx/transforms.cpp: a depth-first walk counts how often each operation is needed, then a
breadth-first walk from the outputs, never wider than a limit, lays out a tape that runs backwards.
"""

from __future__ import annotations

import os

from mlx_tune.graphs.graph import Graph


def evaluation_order(graph: Graph, width: int | None = None) -> list[int]:
    """Indices of the graph's nodes in the order in which `mx.eval(outputs)` runs them.

    Args:
        graph: Arrays to evaluate.
        width: The widest the walk may get; by default what MLX reads from MLX_BFS_MAX_WIDTH, or 20.

    Returns:
        Every node that an output needs, once.
    """
    if width is None:
        width = int(os.environ.get("MLX_BFS_MAX_WIDTH", "20"))
    made_by = graph.producers()
    # The last entry is the synchronizer, an operation on all outputs that MLX evaluates last.
    needs = [[made_by[v] for v in node.inputs if v in made_by] for node in graph.nodes]
    needs.append([made_by[v] for v in graph.outputs if v in made_by])
    root = len(graph.nodes)

    uses: dict[int, int] = {}
    stack = [(root, 0)]
    while stack:
        node, k = stack.pop()
        if k == len(needs[node]):
            continue
        stack.append((node, k + 1))
        needed = needs[node][k]
        if needed not in uses:
            stack.append((needed, 0))
        uses[needed] = uses.get(needed, 0) + 1

    tape, i = [root], 0
    waiting: list[tuple[int, int]] = []
    while uses and (i < len(tape) or waiting):
        if i < len(tape):
            node, k = tape[i], 0
            i += 1
        else:
            node, k = waiting.pop()
        while k < len(needs[node]):
            if len(tape) - i >= width:
                waiting.append((node, k))
                break
            needed = needs[node][k]
            uses[needed] -= 1
            if uses[needed] == 0:
                del uses[needed]
                tape.append(needed)
            k += 1
    return tape[:0:-1]
