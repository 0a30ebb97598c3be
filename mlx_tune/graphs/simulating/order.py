"""The order in which MLX evaluates a graph.

Follows `eval_impl` in mlx/transforms.cpp: a depth-first walk counts how often each operation is needed, then a
breadth-first walk from the outputs, never wider than a limit, lays out a tape that runs backwards.
"""

from __future__ import annotations

import os

from mlx_tune.graphs.graph import Graph


def evaluation_order(graph: Graph, width: int | None = None, *, state_first: bool = False) -> list[int]:
    """Indices of the graph's nodes in the order in which `mx.eval(outputs)` runs them.

    Args:
        graph: Arrays to evaluate.
        width: The widest the walk may get; by default what MLX reads from MLX_BFS_MAX_WIDTH, or 20.
        state_first: True where what the step updates is evaluated before what it returns.

    Returns:
        Every node that an output needs, once.
    """
    if width is None:
        width = int(os.environ.get("MLX_BFS_MAX_WIDTH", "20"))
    made_by = [-1] * len(graph.values)
    for i, operation in enumerate(graph.nodes):
        for value in operation.outputs:
            made_by[value] = i
    # The last entry is the synchronizer, an operation on all outputs that MLX evaluates last.
    ends = graph.outputs
    if state_first:
        ends = [*ends[graph.results :], *ends[: graph.results]]
    reads = [*(operation.inputs for operation in graph.nodes), ends]
    needs = [[made_by[v] for v in values if made_by[v] >= 0] for values in reads]
    root = len(graph.nodes)

    uses, left, stack = [0] * root, 0, [root]
    while stack:  # how often each is needed does not depend on the order of the walk
        for needed in needs[stack.pop()]:
            if not uses[needed]:
                left += 1
                stack.append(needed)
            uses[needed] += 1

    tape, i = [root], 0
    waiting: list[tuple[int, int]] = []
    while left and (i < len(tape) or waiting):
        if i < len(tape):
            node, k = tape[i], 0
            i += 1
        else:
            node, k = waiting.pop()
        below = needs[node]
        while k < len(below):
            if len(tape) - i >= width:
                waiting.append((node, k))
                break
            needed = below[k]
            uses[needed] -= 1
            if uses[needed] == 0:
                left -= 1
                tape.append(needed)
            k += 1
    return tape[:0:-1]
