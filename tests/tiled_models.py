"""Modules that work on each position alone, and those that do not."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

WIDTH = 64


class MLP(nn.Module):
    """As Llama's."""

    def __init__(self, wide: int = 160, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, wide, bias=False), nn.Linear(WIDTH, wide)
        self.down = nn.Linear(wide, WIDTH, bias=False)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(self.dropout(nn.silu(self.gate(x)) * self.up(x)))


class Experts(nn.Module):
    """A mixture: routing, and experts that are given the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.experts = SwitchGLU(WIDTH, 32, 4)

    def __call__(self, x: mx.array) -> mx.array:
        scores = mx.softmax(self.router(x), axis=-1)
        chosen = mx.stop_gradient(mx.argpartition(-scores, kth=1, axis=-1)[..., :2])
        return (self.experts(x, chosen) * mx.take_along_axis(scores, chosen, axis=-1)[..., None]).sum(-2)


class Several(nn.Module):
    """Nested containers and two outputs, one of which nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = {"first": [nn.Linear(WIDTH, 48)], "second": (nn.Linear(48, WIDTH),)}
        self.shift = mx.zeros((WIDTH,))

    def __call__(self, x: mx.array) -> dict[str, object]:
        inner = mx.tanh(self.parts["first"][0](x))
        return {"y": self.parts["second"][0](inner) + self.shift, "inner": [inner]}


class Adding(nn.Module):
    """Two arrays with positions, one without, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x: mx.array, *, residual: mx.array, scale: mx.array, power: int) -> mx.array:
        return residual + scale * self.one(x) ** power


def adapted(kind: type, quantized: bool = False) -> nn.Module:
    """An MLP with adapters as mlx-lm trains it."""
    module = MLP()
    module.freeze()
    for name in ("gate", "down"):
        layer = module[name]
        base = nn.QuantizedLinear.from_linear(layer, 32, 4) if quantized else layer
        made = kind.from_base(base, r=4)
        made.lora_b = 0.1 * mx.random.normal(made.lora_b.shape)
        made.freeze()
        made.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
        module[name] = made
    return module


KINDS = {
    "mlp": MLP,
    "frozen in part": lambda: MLP().freeze(keys=["bias"]),
    "lora": lambda: adapted(LoRALinear),
    "lora on quantized": lambda: adapted(LoRALinear, quantized=True),
    "dora": lambda: adapted(DoRALinear),
    "experts": Experts,
    "norm": lambda: nn.RMSNorm(WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "linear": lambda: nn.Linear(WIDTH, 24),
    "activation": nn.GELU,
    "nested": Several,
}


def made(kind: str) -> nn.Module:
    mx.random.seed(0)
    module = KINDS[kind]()
    mx.eval(module.parameters())
    return module


def first_output(result: object) -> mx.array:
    return result["y"] if isinstance(result, dict) else result


def gradients(module: nn.Module, x: mx.array, compiled: bool = False, **named: object) -> dict[str, mx.array]:
    """The output, and gradients of the input and of what is trained."""

    def loss(trained: object, x: mx.array) -> tuple[mx.array, mx.array]:
        module.update(trained)
        y = first_output(module(x, **named))
        return (y * mx.sin(mx.arange(y.size).reshape(y.shape))).sum(), y

    trained = module.trainable_parameters()
    function = mx.value_and_grad(loss, argnums=(0, 1))
    function = mx.compile(function, inputs=[module.state, mx.random.state]) if compiled else function
    try:
        (_, y), (of_trained, of_x) = function(trained, x)
        found = {"y": y, "x": of_x, **dict(tree_flatten(of_trained))}
        mx.eval(found)
        return found
    finally:
        module.update(trained)


def furthest(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    """The largest difference, over the largest number of each array."""
    assert found.keys() == expected.keys()
    return max(
        float((mx.abs(found[name] - expected[name]).max() / mx.maximum(mx.abs(expected[name]).max(), 1e-20)).item())
        for name in found
    )
