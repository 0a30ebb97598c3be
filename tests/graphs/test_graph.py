import mlx.core as mx
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune.graphs.graph import Graph, Node, Value


@st.composite
def graphs(draw) -> Graph:
    """Some inputs, and operations each of which reads values that are there already."""
    roles = draw(st.lists(st.sampled_from(["parameter", "batch", "captured"]), min_size=1, max_size=4))
    values, nodes = [Value((2,), mx.float32, role) for role in roles], []
    for _ in range(draw(st.integers(0, 8))):
        inputs = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
        made = draw(st.integers(1, 2))
        nodes.append(Node("Op", tuple(inputs), tuple(range(len(values), len(values) + made))))
        values += [Value((2,), mx.float32)] * made
    outputs = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3))
    return Graph(values, nodes, outputs, held=set(range(len(roles))))


def leads_to(graph: Graph, value: int, outputs: list[int]) -> bool:
    """True where one of the outputs is the value, or is made of it, by trying every way forward."""
    after = [made for node in graph.nodes if value in node.inputs for made in node.outputs]
    return value in outputs or any(leads_to(graph, made, outputs) for made in after)


@given(graphs())
def test_what_leads_to_no_output_is_dropped_and_all_else_stays(graph: Graph) -> None:
    needed = [node for node in graph.nodes if any(leads_to(graph, made, graph.outputs) for made in node.outputs)]
    read = {value for node in needed for value in node.inputs} | set(graph.outputs)
    held = {v for v in graph.held if graph.values[v].role != "captured" or v in read}
    graph.drop_unneeded()
    assert graph.nodes == needed
    assert graph.held == held


@given(graphs())
def test_every_value_is_an_input_or_has_one_producer(graph: Graph) -> None:
    made_by = graph.producers()
    assert all(value in graph.nodes[node].outputs for value, node in made_by.items())
    assert sorted([*graph.inputs(), *made_by]) == list(range(len(graph.values)))


def test_bytes_are_those_of_the_array() -> None:
    for shape, dtype in [((3, 4), mx.float32), ((), mx.bfloat16), ((0, 5), mx.int64)]:
        assert Value(shape, dtype).nbytes == mx.zeros(shape, dtype).nbytes


@given(graphs(), st.randoms())
def test_sorted_operations_come_after_those_that_make_what_they_read(graph: Graph, random) -> None:
    nodes = list(graph.nodes)
    random.shuffle(graph.nodes)
    graph.sort()
    assert sorted(graph.nodes) == sorted(nodes)
    there = set(graph.inputs())
    for node in graph.nodes:
        assert there.issuperset(node.inputs)
        there.update(node.outputs)
