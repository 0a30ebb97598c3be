"""The order of evaluation."""

from __future__ import annotations

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.graphs.graph import Graph, Node, Value
from mlx_tune.graphs.simulating.order import evaluation_order


def graph_of(edges: dict[int, tuple[int, ...]], outputs: list[int]) -> Graph:
    """Nodes that make the values of `edges` out of the given ones; values without an entry are inputs."""
    count = 1 + max([*edges, *(v for inputs in edges.values() for v in inputs)])
    values = [Value((1,), mx.float32, "made" if v in edges else "batch") for v in range(count)]
    return Graph(values, [Node("Add", inputs, (v,)) for v, inputs in edges.items()], outputs)


def test_a_chain_runs_from_its_start() -> None:
    assert evaluation_order(graph_of({1: (0,), 2: (1,), 3: (2,)}, [3])) == [0, 1, 2]


def test_what_no_output_needs_is_left_out() -> None:
    assert evaluation_order(graph_of({1: (0,), 2: (0,)}, [2])) == [1]


def test_breadth_comes_first_and_the_last_output_is_evaluated_first() -> None:
    # Two chains 0 -> 1 -> 2 and 0 -> 3 -> 4: the walk from the outputs goes level by level, and runs backwards.
    graph = graph_of({1: (0,), 2: (1,), 3: (0,), 4: (3,)}, [2, 4])
    assert [graph.nodes[i].outputs[0] for i in evaluation_order(graph)] == [3, 1, 4, 2]


def test_the_state_comes_before_the_results_where_that_is_asked_for() -> None:
    graph = graph_of({1: (0,), 2: (0,), 3: (0,)}, [1, 2, 3])
    graph.results = 1
    assert [graph.nodes[i].outputs[0] for i in evaluation_order(graph)] == [3, 2, 1]
    assert [graph.nodes[i].outputs[0] for i in evaluation_order(graph, state_first=True)] == [1, 3, 2]


def test_beyond_the_width_the_walk_goes_down_one_branch_at_a_time() -> None:
    edges: dict[int, tuple[int, ...]] = {}
    for chain in range(4):
        edges |= {1 + 3 * chain: (0,), 2 + 3 * chain: (1 + 3 * chain,), 3 + 3 * chain: (2 + 3 * chain,)}
    graph = graph_of(edges, [3, 6, 9, 12])
    wide = [graph.nodes[i].outputs[0] for i in evaluation_order(graph, width=20)]
    narrow = [graph.nodes[i].outputs[0] for i in evaluation_order(graph, width=1)]
    assert wide == [10, 7, 4, 1, 11, 8, 5, 2, 12, 9, 6, 3]
    assert narrow == [10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30).flatmap(lambda n: st.tuples(*(st.sets(st.integers(0, k), max_size=3) for k in range(n)))))
def test_every_needed_operation_runs_once_and_after_what_it_needs(needs: tuple[set[int], ...]) -> None:
    edges = {k + 1: tuple(sorted(inputs)) for k, inputs in enumerate(needs)}
    graph = graph_of(edges, [len(needs)])
    for width in (1, 3, 20):
        done: set[int] = set()
        for index in evaluation_order(graph, width):
            node = graph.nodes[index]
            assert all(v in done for v in node.inputs if v in edges)
            assert node.outputs[0] not in done
            done.add(node.outputs[0])
        reached, waiting = set(), [len(needs)]
        while waiting:
            v = waiting.pop()
            if v in edges and v not in reached:
                reached.add(v)
                waiting.extend(edges[v])
        assert done == reached
