"""Buffers that are held until the device is done with what reads them."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest

from mlx_tune.graphs.backends import Rules, rules_of
from mlx_tune.graphs.graph import Graph, Node, Value
from mlx_tune.graphs.simulating.timeline import Timeline, simulate

MIB = 1 << 20


def products(count: int, side: int = 2048) -> Graph:
    """A chain of matrix products, each with the same second matrix, as in tests on a GPU."""
    shapes = [Value((side, side), mx.bfloat16, "batch" if v < 2 else "made") for v in range(count + 2)]
    nodes = [Node("Matmul", (0 if i == 0 else i + 1, 1), (i + 2,)) for i in range(count)]
    return Graph(shapes, nodes, [count + 1], results=1, held={0, 1})


def followed(graph: Graph, rules: Rules, limit_bytes: float = 0) -> Timeline:
    return simulate(graph, list(range(len(graph.nodes))), rules, limit_bytes=limit_bytes)


@pytest.mark.parametrize(("count", "matrices"), [(10, 10), (101, 101), (120, 101), (250, 102), (400, 102)])
def test_a_cuda_graph_holds_what_its_products_read(count: int, matrices: int) -> None:
    """As measured on an H200 under a limit of one byte: 101 kernels a graph, and what the next one begins with."""
    timeline = followed(products(count), rules_of("cuda"))
    own = timeline.peak_bytes - timeline.start_bytes
    assert own // (8 * MIB) == matrices
    assert set(timeline.command_buffers) <= {101}


def test_sums_of_two_readings_hold_two_of_three_results() -> None:
    """sin, cos and their sum, which takes the place of one of them: 69 of 101 kernels' results, as measured."""
    nodes, values, y = list[Node](), [Value((1024, 1024), mx.float32, "batch")], 0
    for _ in range(101):
        a, b, c = len(values), len(values) + 1, len(values) + 2
        values += [Value((1024, 1024), mx.float32)] * 3
        nodes += [Node("Sin", (y,), (a,)), Node("Cos", (y,), (b,)), Node("Add", (b, a), (c,))]
        y = c
    timeline = followed(Graph(values, nodes, [y], results=1, held={0}), rules_of("cuda"))
    assert (timeline.peak_bytes - timeline.start_bytes) // (4 * MIB) == pytest.approx(69, abs=1)


def test_large_arrays_fill_a_graph_before_its_kernels_do() -> None:
    graph = products(40, side=1 << 14)  # 2 x 2**28 elements each
    assert followed(graph, rules_of("cuda")).command_buffers == [2] * 20
    # Metal counts each array once a buffer, the result too: three of them are above 50 * 2**20.
    assert set(followed(graph, rules_of("metal")).command_buffers) == {1}


def test_ten_buffers_are_under_way_and_one_is_filled_without_a_limit() -> None:
    free = followed(products(3000), rules_of("cuda"), math.inf)
    assert (free.peak_bytes - free.start_bytes) // (8 * MIB) == 101 * 11 + 1
    chained = followed(products(3000), rules_of("cuda"), 2000 * 8 * MIB)
    assert chained.peak_bytes == free.peak_bytes


def test_a_limit_holds_dispatch_back_as_soon_as_a_buffer_is_full() -> None:
    limit = 200 * 8 * MIB
    timeline = followed(products(3000), rules_of("cuda"), limit)
    # Above the limit `eval` hands over what it has and waits for the oldest that is full.
    assert limit < timeline.peak_bytes <= limit + 101 * 8 * MIB
    assert (
        followed(products(3000), rules_of("cuda"), 1).peak_bytes
        == followed(products(3000), rules_of("cuda")).peak_bytes
    )


def test_what_an_uncommitted_kernel_reads_is_not_handed_on() -> None:
    nodes = [Node("Sin", (0,), (1,)), Node("Cos", (1,), (2,)), Node("Exp", (1,), (3,)), Node("Add", (2, 3), (4,))]
    values = [Value((1 << 20,), mx.float32, "batch" if v == 0 else "made") for v in range(5)]
    graph = Graph(values, nodes, [4], results=1, held={0})
    # On a CPU Exp takes over what Cos has read; a kernel that has not run may still read it.
    assert followed(graph, rules_of("cpu")).peak_bytes == 3 * 4 * MIB
    assert followed(graph, rules_of("cuda")).peak_bytes == 4 * 4 * MIB


def test_a_processor_has_ten_operations_a_task() -> None:
    """Two dispatches for each product: five products a task, ten tasks under way. Measured on a CPU: 56 matrices."""
    free = followed(products(400), rules_of("cpu"), math.inf)
    assert (free.peak_bytes - free.start_bytes) // (8 * MIB) == 56
    assert followed(products(400), rules_of("cpu")).peak_bytes == 4 * 8 * MIB


@pytest.mark.parametrize(
    ("before", "between", "arrays"),
    [
        (90, ["Sin"], 2),  # all in one graph
        (99, [], 2),  # the gradient is the first in the next graph
        (99, ["Reshape", "Reshape"], 2),  # and views take no time
        (98, ["Sin"], 1),  # it is the first there, and another was the last in the one before
        (99, ["Sin"], 1),  # it is the second there
    ],
)
def test_the_next_kernel_cannot_take_over_what_the_last_of_a_buffer_read(
    before: int, between: list[str], arrays: int
) -> None:
    """A loss and its gradient, as in a LoRA step on an H200, where the logits stayed beside their gradient."""
    values = [Value((1024,), mx.float32, "batch")]
    nodes = list[Node]()

    def add(name: str, shape: tuple[int, ...], *inputs: int) -> int:
        values.append(Value(shape, mx.float32))
        nodes.append(Node(name, inputs, (len(values) - 1,)))
        return len(values) - 1

    row = 0
    for _ in range(before):
        row = add("Sin", (1024,), row)
    logits = add("Gather", (1024, 1024), row)
    loss = add("CrossEntropy", (1024,), logits, 0)
    for name in between:
        loss = add(name, (1024,), loss)
    gradient = add("CrossEntropyVJP", (1024, 1024), logits, 0, loss, row)
    timeline = followed(Graph(values, nodes, [gradient], results=1, held={0}), rules_of("cuda"))
    assert timeline.peak_bytes // (4 * MIB) == arrays


def test_what_nobody_reads_any_more_is_gone_before_the_next_kernel_allocates() -> None:
    """The logits of a large vocabulary beside their gradient, but not beside its copy in bfloat16: 11.70 GB, measured.

    Each kernel fills a buffer, so that the last one's arrays are late for every next one.
    """
    shape = (8192, 151_936)
    numbers = shape[0] * shape[1]
    values = [Value((8192,), mx.int32, "batch"), Value(shape, mx.bfloat16, "batch")]
    nodes = list[Node]()

    def add(name: str, shape: tuple[int, ...], dtype: mx.Dtype, *inputs: int) -> int:
        values.append(Value(shape, dtype))
        nodes.append(Node(name, inputs, (len(values) - 1,)))
        return len(values) - 1

    logits = add("AsType", shape, mx.float32, 1)
    loss = add("CrossEntropy", (8192,), mx.float32, logits, 0)
    gradient = add("CrossEntropyVJP", shape, mx.float32, logits, 0, loss, loss)
    half = add("AsType", shape, mx.bfloat16, gradient)
    timeline = followed(Graph(values, nodes, [half], results=1, held={0}), rules_of("cuda"))
    assert timeline.command_buffers == [1, 1, 1, 1]
    assert (timeline.peak_bytes - values[0].nbytes) / numbers == pytest.approx(8, rel=1e-3)
