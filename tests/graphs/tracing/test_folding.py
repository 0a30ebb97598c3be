from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import mlx_tune as mt
from mlx_tune.graphs import ArraySpec, estimate_memory
from mlx_tune.graphs.graph import Graph, Node, Value
from mlx_tune.graphs.simulating.order import evaluation_order
from mlx_tune.graphs.tracing.built_graph import BuiltGraph
from mlx_tune.graphs.tracing.trace import trace_step
from mlx_tune.trees import arrays_of


def test_checkpointing_a_block_lowers_the_floor() -> None:
    def floor(wrap: Callable[[Callable[..., mx.array]], Callable[..., mx.array]]) -> int:
        def block(w: mx.array, x: mx.array) -> mx.array:
            return mx.sin(mx.exp(mx.tanh(x @ w) * 2) + x) * 0.1

        def loss(weights: list[mx.array], x: mx.array) -> mx.array:
            for w in weights:
                x = wrap(block)(w, x)
            return x.sum()

        weights = [ArraySpec((128, 128), mx.float32)] * 4
        return estimate_memory(
            lambda w, x: mx.value_and_grad(loss)(w, x), weights, ArraySpec((1024, 128), mx.float32), backend="cpu"
        ).floor_bytes

    plain, checkpointed = floor(lambda f: f), floor(lambda f: mx.checkpoint(f))
    assert checkpointed < 0.8 * plain


class Block(nn.Module):
    """A block some of whose parameters are frozen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.wide.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.narrow(mx.tanh(self.wide(x)))


@pytest.mark.parametrize("state_first", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_a_checkpointed_step_is_followed_in_the_order_in_which_mlx_evaluates_it(
    state_first: bool, dtype: mx.Dtype
) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [mt.checkpoint(Block(16)) for _ in range(4)]

        def __call__(self, x: mx.array) -> mx.array:
            for layer in self.layers:
                x = layer(x)
            return x.square().mean()

    model, optimizer, x = Stack(), optim.Adam(1e-3), mx.ones((8, 16), dtype)
    model.set_dtype(dtype)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    gradient = nn.value_and_grad(model, lambda model, x: model(x))

    def update(x: mx.array) -> mx.array:
        loss, gradients = gradient(model, x)
        optimizer.update(model, gradients)
        return loss

    mx.eval(state, x)
    graph = trace_step(mx.compile(update, inputs=state, outputs=state), (x,), (model, optimizer))
    followed = [graph.nodes[i].name for i in evaluation_order(graph, state_first=state_first)]
    loss = mx.compile(update, inputs=state, outputs=state)(x)
    ends = [*arrays_of((model, optimizer)), loss] if state_first else [loss, *arrays_of((model, optimizer))]
    built = BuiltGraph([], ends)
    real = Graph([Value((), mx.float32)] * built.count, [Node(*node) for node in built.nodes], list(built.outputs))
    evaluated = [real.nodes[i].name for i in evaluation_order(real)]
    # MLX's names for drawing are longer than those of its exporter.
    same = {"Sum": "Reduce"}
    assert followed == ["Compiled" if name.startswith("Compiled") else same.get(name, name) for name in evaluated]
    # The outputs' gradients, the inputs, and but for the first block the gradient of its input, which nobody asks for.
    assert followed.count("Depends") == 3 * len(model.layers) - 1
