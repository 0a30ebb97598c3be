"""Steps with more inputs and outputs than MLX takes names at once."""

import mlx.core as mx
import pytest

import mlx_tune.graphs.built as built
from mlx_tune import estimate_memory


def step(*arrays):
    total = sum(a * a for a in arrays)
    return [total, *(a - total for a in arrays)]


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_graph_written_in_several_parts_is_the_same_graph(monkeypatch, most):
    arrays = [mx.ones((100 + i,))[:100] for i in range(6)]
    whole = estimate_memory(step, *arrays)
    monkeypatch.setattr(built, "MOST_NAMES", most)
    parts = estimate_memory(step, *arrays)
    assert parts.floor_bytes == whole.floor_bytes
    assert parts.operations == whole.operations


def test_a_step_of_more_than_1024_arrays_is_estimated():
    arrays = [mx.ones((4,)) for _ in range(600)]
    assert estimate_memory(step, *arrays).floor_bytes >= 2 * 600 * 16
