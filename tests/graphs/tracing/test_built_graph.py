"""Names of arrays in a graph as it was built: any number of them, each array once, and what the graph does not hold."""

import mlx.core as mx
from hypothesis import given
from hypothesis import strategies as st

from mlx_tune import estimate_memory
from mlx_tune.graphs.tracing.built_graph import BuiltGraph


def step(*arrays):
    total = sum(a * a for a in arrays)
    return [total, *(a - total for a in arrays)]


def test_a_step_of_more_arrays_than_mlx_takes_names_is_estimated():
    arrays = [mx.ones((4,)) for _ in range(1500)]
    assert estimate_memory(step, *arrays).floor_bytes >= 2 * 1500 * 16


@given(st.lists(st.integers(0, 7), max_size=12), st.lists(st.integers(0, 7), max_size=12))
def test_each_array_has_the_name_that_its_operation_gives_it(outputs, others):
    leaf = mx.array([1.0, 2.0])
    first, second = mx.split(leaf, 2)
    chain = [leaf, mx.exp(leaf), mx.sin(first), second, first + second, mx.array(3.0)]
    arrays = [*chain, chain[1] * 2, mx.cos(chain[4])]
    graph = BuiltGraph([leaf], [arrays[i] for i in outputs], [arrays[i] for i in others])
    name_of = dict(zip(outputs, graph.outputs, strict=True)) | {0: graph.inputs[0]}
    assert len(set(name_of.values())) == len(name_of)
    made = {name: node.name for node in graph.nodes for name in node.outputs}
    for i, operation in {1: "Exp", 2: "Sin", 3: "Split", 4: "Add", 6: "Multiply", 7: "Cos"}.items():
        assert i not in name_of or made[name_of[i]] == operation
    assert not {0, 5} & name_of.keys() or not {name_of[i] for i in {0, 5} & name_of.keys()} & made.keys()
    reachable = {name for node in graph.nodes for name in node.inputs} | made.keys() | set(name_of.values())
    for i, name in zip(others, graph.others, strict=True):
        assert name is None or name in reachable
        assert i not in name_of or name == name_of[i]
    # An operation that only the others need is no part of the graph.
    assert ("Cos" in made.values()) == (7 in outputs)
