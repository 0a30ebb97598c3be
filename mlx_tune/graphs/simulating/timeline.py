"""The memory of a step over its operations, with the device keeping up with dispatch.

MLX allocates an output when it queues the operation, and frees a buffer when the last operation that reads it has
run. Under the lowest memory limit `eval` waits for the device whenever it can, so every buffer is gone before the
next operation allocates: that is the floor, and what is followed here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mlx_tune.graphs.graph import Graph, Node
from mlx_tune.graphs.simulating.allocator import Allocator, Buffer
from mlx_tune.graphs.simulating.cpu import effect_of


@dataclass
class Timeline:
    """The course of a simulated evaluation.

    `live` holds the most bytes that were alive while each operation was evaluated, `split` the same by purpose, in
    the order of `PURPOSES`; `owners` are the buffers alive at the peak.
    """

    peak_bytes: int
    peak_step: int
    start_bytes: int
    end_bytes: int
    order: list[int]
    live: list[int]
    split: list[list[int]]
    owners: list[Buffer]
    unknown: Counter[str]


def simulate(graph: Graph, order: list[int]) -> Timeline:
    """Follow the graph's memory without running the graph.

    Args:
        graph: The step.
        order: The nodes in the order in which MLX evaluates them.

    Returns:
        The peak, who holds it, and the memory after every operation.
    """
    references = [0] * len(graph.values)
    machine = Allocator(graph, order, references=references, updates=frozenset(graph.outputs[graph.results :]))
    for index in order:
        node = graph.nodes[index]
        for value in node.inputs:
            # Each output of an operation holds its own references to the inputs (mlx/array.cpp).
            references[value] += len(node.outputs)
    for value in [*graph.outputs, *graph.held]:
        references[value] += 1
    inputs = list(graph.inputs())
    for value in inputs:
        machine.allocate(value)
    for value in inputs:
        if references[value] == 0:
            machine.release(machine.buffer.pop(value))
    start, live, split, unknown = machine.live, [], [], Counter[str]()
    for machine.step, index in enumerate(order):
        node = graph.nodes[index]
        effect, known = effect_of(node.name)
        if not known:
            unknown[node.name] += 1
        machine.high, machine.high_split = machine.live, machine.now.copy()
        effect(machine, node)
        live.append(machine.high)
        split.append(machine.high_split)
        _finish(machine, node)
    return Timeline(machine.peak, machine.peak_step, start, machine.live, order, live, split, machine.owners(), unknown)


def _finish(machine: Allocator, node: Node) -> None:
    """Free the working memory, drop the operation's claims on its inputs, and outputs that nothing needs."""
    while machine.temporaries:
        machine.release(machine.temporaries.pop())
    references, claims = machine.references, len(node.outputs)
    for value in node.inputs:
        references[value] -= claims
    for values in (node.inputs, node.outputs):
        for value in values:
            if references[value] == 0 and value in machine.buffer:
                machine.release(machine.buffer.pop(value))
