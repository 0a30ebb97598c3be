"""Estimating takes work in proportion to the step: lines run by the library and text written by MLX are counted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_map

import mlx_tune as mt
from mlx_tune.graphs.tracing import built_graph

PACKAGE = str(Path(mt.__file__).parent)


class Block(nn.Module):
    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.b(self.activation(self.a(x)))


class Net(nn.Module):
    def __init__(self, blocks: int, activation: Any) -> None:
        super().__init__()
        self.layers = [Block(activation) for _ in range(blocks)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


@mx.custom_function
def squared(x: mx.array) -> mx.array:
    return x * x


@squared.vjp
def squared_gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    return 2 * x * cotangent


def training(blocks: int, kind: str) -> tuple[Any, Any, Any]:
    activation = {"compiled activations": nn.gelu, "custom gradients": squared}.get(kind, nn.relu)
    model, optimizer = Net(blocks, activation), optim.AdamW(1e-4)
    mx.eval(model.parameters())
    optimizer.init(model.trainable_parameters())
    if kind == "checkpointed":
        mt.checkpoint_blocks(model)
    gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())

    def step(x: mx.array) -> mx.array:
        loss, grads = gradients(model, x)
        if kind == "clipped and guarded":
            grads, norm = optim.clip_grad_norm(grads, 1.0)
            fine = mx.isfinite(norm)
            grads = tree_map(lambda g: mx.where(fine, g, 0), grads)
        optimizer.update(model, grads)
        return loss

    if kind == "compiled":
        state = [model.state, optimizer.state]
        return mx.compile(step, inputs=state, outputs=state), model, optimizer
    return step, model, optimizer


class Counting:
    """Lines of the library that ran, each turn of a comprehension included, and characters that MLX wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines = self.characters = 0
        drawing = built_graph.drawing

        def counted(*arrays: mx.array) -> str:
            text = drawing(*arrays)
            self.characters += len(text)
            return text

        monkeypatch.setattr(built_graph, "drawing", counted)

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        self.lines += event == "line"
        return self._line

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def __enter__(self) -> Counting:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


@pytest.mark.parametrize(
    "kind", ["plain", "compiled", "compiled activations", "custom gradients", "checkpointed", "clipped and guarded"]
)
def test_four_times_the_blocks_take_four_times_the_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = {}
    for blocks in (6, 24, 96):
        step, model, optimizer = training(blocks, kind)
        counting = Counting(monkeypatch)
        with counting:
            mt.estimate_memory(step, mx.ones((2, 4)), state=(model, optimizer))
        work[blocks] = (counting.lines, counting.characters)
    for small, large, larger in zip(*work.values(), strict=True):
        assert small > 0
        assert larger - large < 4.4 * (large - small), work
