"""Steps of which only some parts are compiled: fused as in MLX where they are, and as built where they are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_map

from mlx_tune.graphs import estimate_memory
from mlx_tune.graphs.simulating.order import evaluation_order
from mlx_tune.graphs.tracing.built_graph import BuiltGraph
from mlx_tune.graphs.tracing.trace import trace_step
from mlx_tune.trees import arrays_of


def operations(nodes: Any) -> Counter[tuple[bool, int, int]]:
    """How many operations there are, fused and not, by the numbers of their inputs and outputs.

    Those that only give an array another name do not count: a compiled gradient leaves some on the parameters.
    """
    counted = (node for node in nodes if node.name not in ("Copy", "StopGradient"))
    return Counter((node.name.startswith("Compiled"), len(node.inputs), len(node.outputs)) for node in counted)


class Training:
    """A student, a teacher, an optimizer, and steps that compile different parts of the work."""

    def __init__(self) -> None:
        mx.random.seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.teacher = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.SiLU())
        self.optimizer = optim.AdamW(1e-3)
        self.optimizer.init(self.model.trainable_parameters())
        self.state = (self.model, self.optimizer)
        mx.eval(self.model.parameters(), self.teacher.parameters(), self.optimizer.state)
        self.gradient = nn.value_and_grad(self.model, self.loss)
        held = [self.model.state, self.optimizer.state]
        self.fast_gradient = mx.compile(self._gradient, inputs=held)
        self.fast_update = mx.compile(self._update, inputs=held, outputs=held)

    @staticmethod
    def loss(model: nn.Module, x: mx.array, target: mx.array) -> mx.array:
        # Written twice on purpose: a compiled part computes it once.
        return mx.exp(model(x) - target).mean() + mx.exp(model(x) - target).max()

    def _gradient(self, x: mx.array, target: mx.array) -> Any:
        return self.gradient(self.model, x, target)

    def _update(self, gradients: Any) -> None:
        self.optimizer.update(self.model, gradients)

    def teaching(self, x: mx.array) -> mx.array:
        """Nothing compiled by the step; the teacher's activations are, outside of the gradient."""
        loss, gradients = self.gradient(self.model, x, self.teacher(x))
        self._update(gradients)
        return loss

    def updating(self, x: mx.array) -> mx.array:
        """The update compiled, the gradient not."""
        loss, gradients = self.gradient(self.model, x, x)
        self.fast_update(gradients)
        return loss

    def differentiating(self, x: mx.array) -> mx.array:
        """The gradient compiled and called twice, the update not."""
        loss, gradients = self.fast_gradient(x, x)
        again, more = self.fast_gradient(x * 2, x)
        self._update(tree_map(mx.add, gradients, more))
        return loss + again


@pytest.mark.parametrize("name", ["teaching", "updating", "differentiating"])
def test_compiled_parts_fuse_as_in_mlx_and_the_rest_is_as_built(name: str) -> None:
    training = Training()
    step: Callable[[mx.array], mx.array] = getattr(training, name)
    x = mx.full((8, 16), 0.5)
    mx.eval(x)
    graph = trace_step(step, (x,), training.state)
    assert graph.compiled
    loss = step(x)
    built = BuiltGraph([], [loss, *arrays_of(training.state)])
    assert any(node.name.startswith("Compiled") for node in built.nodes)
    assert operations(graph.nodes[i] for i in evaluation_order(graph)) == operations(built.nodes)


def test_nothing_is_fused_while_compiling_is_switched_off() -> None:
    compiled, x = mx.compile(lambda x: mx.exp(mx.sin(x) * 2) + 1), mx.zeros((64, 64))
    on = estimate_memory(compiled, x)
    mx.disable_compile()
    try:
        off = estimate_memory(compiled, x)
    finally:
        mx.enable_compile()
    assert (on.compiled, off.compiled) == (True, False)
    assert on.operations == ("Compiled",)
    assert "Compiled" not in off.operations
