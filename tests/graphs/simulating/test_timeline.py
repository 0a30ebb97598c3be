import mlx.core as mx

from mlx_tune.graphs.graph import Graph, Node, Value
from mlx_tune.graphs.simulating.timeline import simulate

ROW = 4 * 1000


def graph_of(nodes: list[Node], outputs: list[int], values: int, held: set[int]) -> Graph:
    shapes = [Value((1000,), mx.float32, "batch" if v in held else "made") for v in range(values)]
    return Graph(shapes, nodes, outputs, results=len(outputs), held=held)


def test_a_chain_takes_its_input_and_one_buffer_that_is_handed_on() -> None:
    nodes = [Node("Exp", (0,), (1,)), Node("Sin", (1,), (2,)), Node("Tanh", (2,), (3,))]
    timeline = simulate(graph_of(nodes, [3], 4, {0}), [0, 1, 2])
    assert (timeline.start_bytes, timeline.peak_bytes, timeline.end_bytes) == (ROW, 2 * ROW, 2 * ROW)
    assert timeline.live == [2 * ROW] * 3


def test_a_value_that_is_read_later_stays_until_then() -> None:
    nodes = [Node("Exp", (0,), (1,)), Node("Sin", (1,), (2,)), Node("Tanh", (2,), (3,)), Node("Add", (1, 3), (4,))]
    timeline = simulate(graph_of(nodes, [4], 5, {0}), [0, 1, 2, 3])
    assert timeline.live == [2 * ROW, 3 * ROW, 3 * ROW, 3 * ROW]
    assert timeline.end_bytes == 2 * ROW
    assert sorted(owner.value for owner in timeline.owners) == [0, 1, 2]
    assert timeline.peak_step == 1


def test_an_input_that_nobody_holds_is_handed_on_too() -> None:
    graph = graph_of([Node("Exp", (0,), (1,))], [1], 2, {0})
    graph.held = set()
    assert simulate(graph, [0]).peak_bytes == ROW


def test_parts_add_up_and_unknown_operations_are_counted() -> None:
    nodes = [Node("NoSuchOperation", (0,), (1,)), Node("NoSuchOperation", (1,), (2,))]
    timeline = simulate(graph_of(nodes, [2], 3, {0}), [0, 1])
    assert timeline.unknown == {"NoSuchOperation": 2}
    assert [sum(parts) for parts in timeline.split] == timeline.live
