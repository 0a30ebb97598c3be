"""The memory of a step over its operations, with the device keeping up with dispatch, or falling far behind.

MLX allocates an output when it queues the operation, and frees a buffer when the last operation that reads it has
run. Under the lowest memory limit `eval` waits for the device whenever it can: on a CPU every buffer is gone before
the next operation allocates, on a GPU when the command buffer that it was last read in has run. That is the floor.
Without a limit up to ten command buffers are on their way before `eval` waits for the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial

from mlx_tune.graphs.backends import Rules, rounded, rules_of
from mlx_tune.graphs.graph import Graph, Node
from mlx_tune.graphs.simulating import cuda, gpu, metal
from mlx_tune.graphs.simulating.allocator import Allocator, Buffer, Effect
from mlx_tune.graphs.simulating.command_buffers import CommandBuffers
from mlx_tune.graphs.simulating.cpu import CPU


@dataclass
class Timeline:
    """The course of a simulated evaluation.

    `live` holds the most bytes that were alive while each operation was evaluated, `split` the same by purpose, in
    the order of `PURPOSES`; `owners` are the buffers alive at the peak; `command_buffers` has the number of kernels in
    each buffer that was full.
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
    command_buffers: list[int] = field(default_factory=list)


def simulate(graph: Graph, order: list[int], rules: Rules | None = None, *, limit_bytes: float = 0) -> Timeline:
    """Follow the graph's memory without running the graph.

    Args:
        graph: The step.
        order: The nodes in the order in which MLX evaluates them.
        rules: The backend; a CPU by default.
        limit_bytes: The memory limit, infinite for none: above it `eval` waits for the device whenever it can, and up
            to it as much as may be is under way.

    Returns:
        The peak, who holds it, and the memory after every operation.
    """
    rules = rules_of("cpu") if rules is None else rules
    effects = effects_of(rules)
    references = [0] * len(graph.values)
    machine = Allocator(
        graph,
        order,
        rounded=partial(rounded, rules) if rules.rounding else int,
        references=references,
        updates=frozenset(graph.outputs[graph.results :]),
    )
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
    one_by_one = rules.command.waits_for_one and not limit_bytes
    buffers = None if one_by_one else CommandBuffers(rules.command, limit_bytes)
    start, live, split, unknown = machine.live, [], [], Counter[str]()
    for machine.step, index in enumerate(order):
        node = graph.nodes[index]
        effect = effects.get(node.name)
        if effect is None:
            unknown[node.name] += 1
            effect = effects["Arange"]  # one that allocates its outputs and no more
        if buffers is not None:
            buffers.begin(machine)
        machine.high, machine.high_split, machine.launches = machine.live, machine.now.copy(), 0
        effect(machine, node)
        live.append(machine.high)
        split.append(machine.high_split)
        if buffers is not None:
            buffers.add(machine, node)
        _finish(machine, node)
    if buffers is not None:
        buffers.finish(machine)
    return Timeline(
        machine.peak,
        machine.peak_step,
        start,
        machine.live,
        order,
        live,
        split,
        machine.owners(),
        unknown,
        buffers.sizes if buffers is not None else [],
    )


@lru_cache(8)
def effects_of(rules: Rules) -> dict[str, Effect]:
    """For each primitive the function that follows its memory on a backend.

    Args:
        rules: The backend.
    """
    effects = {name: gpu.launching(name, effect) for name, (effect, _) in CPU.items()}
    if rules.name != "cpu":  # cuDNN and Metal choose among plans with working memory that nobody has looked at yet
        del effects["Convolution"]
    own = {"cuda": cuda.CUDA, "metal": metal.METAL}.get(rules.name)
    return effects | {name: effect for name, (effect, _) in (own(rules) if own else {}).items()}


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
