from __future__ import annotations

import mlx.core as mx
import pytest

import mlx_tune.graphs.tracing.trace as tracing
from mlx_tune.graphs import estimate_memory


def test_a_graph_that_cannot_be_told_apart_is_simplified_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(x: mx.array) -> mx.array:
        return mx.exp(x) @ mx.exp(x)

    built = estimate_memory(step, mx.zeros((8, 8)))
    monkeypatch.setattr(tracing, "unmerge", lambda *_: None)
    simplified = estimate_memory(step, mx.zeros((8, 8)))
    assert (built.operations.count("Exp"), simplified.operations.count("Exp")) == (2, 1)
    assert built.stand_ins == {}
    assert "operations that were built twice: taken to be evaluated once" in str(simplified)


def test_one_array_under_two_names_is_counted_once() -> None:
    x = mx.zeros((100, 100))
    mx.eval(x)
    for step, arrays in (
        (lambda x: [x, x.astype(mx.float32)], 1),
        (lambda x: (y := mx.exp(x), y.astype(mx.float32)), 2),
    ):
        assert estimate_memory(step, x, backend="cpu").floor_bytes == arrays * x.nbytes
