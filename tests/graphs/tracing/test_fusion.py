"""Fused graphs against MLX's own: the same operations with the same numbers of inputs and outputs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlx_tune.graphs.simulating.order import evaluation_order
from mlx_tune.graphs.tracing.trace import trace_step


def operations_of_mlx(*outputs: object) -> Counter[tuple[bool, int, int]]:
    """For each operation of a lazy graph: whether it is fused, its inputs and its outputs."""
    text: list[str] = []
    mx.export_to_dot(type("Writer", (), {"write": staticmethod(text.append)}), *outputs)
    blocks: list[list[int | bool]] = []
    for line in "".join(text).splitlines():
        if match := re.match(r'\{ \d+ \[label ="(\w*)', line):
            blocks.append([match[1].startswith("Compiled"), 0, 0])
        elif re.match(r'"[^"]+" -> \d+', line):
            blocks[-1][1] += 1
        elif re.match(r"\d+ -> ", line):
            blocks[-1][2] += 1
    return Counter(tuple(block) for block in blocks)  # type: ignore[misc]


def elementwise(x: mx.array) -> mx.array:
    return mx.exp(x) * 2 + mx.sin(x)


def two_readers(x: mx.array) -> mx.array:
    y = mx.tanh(x) * 3
    return y.sum() + (y * mx.cos(y)).mean()


def broadcasting(x: mx.array) -> mx.array:
    row = mx.sqrt(mx.abs(x[0])) + 1
    return (x - row) / row + (x * row).max(axis=1, keepdims=True)


def deep(x: mx.array) -> mx.array:
    for _ in range(30):
        x = mx.sin(x) + 1
    return x


def wide(x: mx.array) -> mx.array:
    terms = [x @ mx.full((8, 8), float(k)) for k in range(30)]
    total = terms[0]
    for term in terms[1:]:
        total = total + mx.exp(term)
    return total


@pytest.mark.parametrize("function", [elementwise, two_readers, broadcasting, deep, wide])
def test_a_compiled_function_fuses_as_in_mlx(function: Callable[[mx.array], mx.array]) -> None:
    x = mx.full((8, 8), 0.5)
    mx.eval(x)
    compiled = mx.compile(function)
    graph = trace_step(compiled, (x,))
    ours = Counter(
        (graph.nodes[i].name == "Compiled", len(graph.nodes[i].inputs), len(graph.nodes[i].outputs))
        for i in evaluation_order(graph)
    )
    assert graph.compiled
    assert ours == operations_of_mlx(compiled(x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_compiled_training_step_fuses_as_in_mlx(dropout: float) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(32), nn.Linear(32, 4))
    optimizer = optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    mx.eval(state)

    def step(x: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x)
        optimizer.update(model, gradients)
        return loss

    compiled = mx.compile(step, inputs=state, outputs=state)
    x = mx.full((8, 16), 0.5)
    mx.eval(x)
    graph = trace_step(compiled, (x,), (model, optimizer))
    ours = Counter(
        (graph.nodes[i].name == "Compiled", len(graph.nodes[i].inputs), len(graph.nodes[i].outputs))
        for i in evaluation_order(graph)
    )
    loss = compiled(x)
    assert ours == operations_of_mlx(loss, model.parameters(), optimizer.state)


def test_a_compiled_function_inside_a_gradient_is_not_fused() -> None:
    activation = mx.compile(elementwise)
    graph = trace_step(lambda x: mx.grad(lambda x: activation(x).sum())(x), (mx.zeros((4, 4)),))
    assert not graph.compiled
    assert not any(node.name == "Compiled" for node in graph.nodes)
