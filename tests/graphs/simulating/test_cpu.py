"""Simulated memory against the measured floor, operation by operation."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import keeping_up
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from keeping_up import keep_up, throttled_peak

from mlx_tune.graphs import estimate_memory
from mlx_tune.graphs.simulating.cpu import CPU
from mlx_tune.trees import arrays_of

pytestmark = pytest.mark.cpu_only

N = 96


def gather_transposed(x: mx.array) -> mx.array:
    return x.reshape(N, 16, -1).swapaxes(0, 1)[mx.array([3, 1, 2])] * 2


FUNCTIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "elementwise chain in place": lambda x: mx.sin(mx.exp(x) * 2) + 1,
    "a value needed twice": lambda x: mx.exp(x) + mx.exp(x).T,
    "matmul": lambda x: (x @ x) @ x,
    "matmul of a copied layout": lambda x: x.reshape(16, 6, N)[:, ::2] @ mx.exp(x),
    "batched matmul of heads": lambda x: x.reshape(N, 4, -1).swapaxes(0, 1) @ x.reshape(N, 4, -1).transpose(1, 2, 0),
    "softmax": lambda x: mx.softmax(x * 2, axis=-1),
    "softmax of a transposed array": lambda x: mx.softmax(mx.exp(x).T, axis=-1),
    "logsumexp of a transposed array": lambda x: mx.logsumexp(mx.exp(x).T, axis=-1) + 1,
    "reshape that copies": lambda x: mx.exp(mx.exp(x).T.reshape(-1)),
    "cast": lambda x: (x.astype(mx.bfloat16) * 2).astype(mx.float32),
    "concatenate and split": lambda x: mx.concatenate([a * 2 for a in mx.split(mx.exp(x), 4, axis=1)], axis=0),
    "slice keeps its buffer": lambda x: (lambda y: mx.exp(y[:4]).sum() + mx.exp(y @ y).sum())(mx.exp(x)),
    "slice update": lambda x: mx.exp(x).at[2:5].add(1.0),
    "gather": lambda x: x[mx.array([1, 5, 7])] @ x,
    "gather of a transposed array": gather_transposed,
    "scatter": lambda x: mx.zeros((N, N)).at[mx.arange(N) % 7].add(x),
    "cumulative sum of a transposed array": lambda x: mx.cumsum(mx.exp(x).T, axis=0),
    "sort": lambda x: mx.sort(mx.exp(x), axis=0),
    "argsort and take": lambda x: mx.take_along_axis(x, mx.argsort(x, axis=-1), axis=-1),
    "where": lambda x: mx.where(x > 0.5, mx.exp(x), x * 2),
    "pad": lambda x: mx.pad(mx.exp(x), 3) * 2,
    "random": lambda x: x * mx.random.uniform(shape=x.shape),
    "maximum over rows": lambda x: mx.exp(x).max(axis=0) + mx.argmax(x, axis=0),
    "addmm": lambda x: mx.addmm(mx.exp(x), x, x),
    "convolution": lambda x: mx.conv2d(x.reshape(1, 24, 24, 16), mx.ones((8, 3, 3, 16)), padding=1),
    "convolution in bfloat16": lambda x: mx.conv2d(
        x.reshape(1, 24, 24, 16).astype(mx.bfloat16), mx.ones((8, 3, 3, 16), mx.bfloat16), stride=2
    ),
    "grouped convolution": lambda x: mx.conv1d(x.reshape(1, -1, 16), mx.ones((16, 4, 1)), groups=16),
    "transposed convolution": lambda x: mx.conv_transpose2d(
        x.reshape(1, 24, 24, 16), mx.ones((8, 3, 3, 16)), padding=1
    ),
    "quantized matmul": lambda x: mx.quantized_matmul(x, *mx.quantize(x * 1.0, 32, 4), group_size=32, bits=4),
    "divmod": lambda x: sum(mx.divmod(mx.exp(x), x)),
    "attention": lambda x: mx.fast.scaled_dot_product_attention(
        *(y.reshape(1, N, 4, -1).swapaxes(1, 2) for y in (mx.exp(x), x, x + 1)), scale=0.1
    ),
    "norms": lambda x: mx.fast.layer_norm(mx.fast.rms_norm(x, None, 1e-5), None, None, 1e-5),
    "rope": lambda x: mx.fast.rope(x.reshape(1, 4, N, -1), 16, traditional=False, base=1e4, scale=1.0, offset=0),
}


@mx.custom_function
def gate(x: mx.array) -> mx.array:
    return mx.tanh(x) * mx.sigmoid(x)


@gate.vjp
def gate_vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * (1 + x)


@mx.custom_function
def rotate(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    return x * mx.cos(y) - mx.sin(x), mx.exp(y) + x


@rotate.vjp
def rotate_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    (_, y), (a, b), (u, v) = primals, cotangents, outputs
    return a @ u + b, (a * v).T @ y


@mx.custom_function
def halved(x: mx.array) -> mx.array:
    return mx.exp(x.astype(mx.float32) * 0.5).astype(x.dtype)


@halved.vjp
def halved_vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return (cotangent * y) * 0.5


@mx.custom_function
def total(x: mx.array) -> mx.array:
    return mx.exp(x).sum()


@total.vjp
def total_vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return mx.exp(x) * cotangent


@mx.custom_function
def mapped(x: mx.array) -> mx.array:
    return mx.sin(mx.exp(x) * 2) * x


@mapped.vmap
def mapped_vmap(x: mx.array, axis: int) -> tuple[mx.array, int]:
    return mapped(x), axis


def layers(x: mx.array, activation: Callable[[mx.array], mx.array], depth: int = 3) -> mx.array:
    for _ in range(depth):
        x = activation(mx.tanh(x) @ x)
    return x


def experts(x: mx.array, *, sort: bool, train: bool = True) -> mx.array:
    """A layer of four experts that get unequal shares of the rows."""
    chosen = mx.arange(N, dtype=mx.uint32) ** 2 % 5 % 4
    rows = mx.tanh(x)
    if sort:
        order = mx.argsort(chosen)
        rows, chosen = rows[order], chosen[order]
    weights = mx.sin(x if train else mx.stop_gradient(x)).reshape(4, N // 4, N).swapaxes(-1, -2)
    return mx.gather_mm(rows[:, None], weights, rhs_indices=chosen, sorted_indices=sort).square().mean()


# Losses whose gradients are taken, with functions that have gradients of their own.
LOSSES: dict[str, Callable[[mx.array], mx.array]] = {
    "custom gradient": lambda x: layers(x, gate).square().mean(),
    "custom gradient of a custom gradient's result": lambda x: layers(x, lambda y: gate(gate(y)), 2).sum(),
    "custom gradient of two inputs and outputs": lambda x: sum(y.sum() for y in rotate(mx.exp(x), mx.tanh(x) @ x)),
    "custom gradient of one of two outputs": lambda x: rotate(mx.exp(x), x @ x)[0].mean(),
    "custom gradient in bfloat16": lambda x: layers(x.astype(mx.bfloat16), halved).sum(),
    "custom gradient of a scalar": lambda x: total(mx.tanh(x) @ x) * 2,
    "custom function with a derivative of MLX's": lambda x: layers(x, mapped).sum(),
    "checkpoint": lambda x: layers(x, mx.checkpoint(lambda y: mx.sin(mx.exp(y) @ y) * y)).sum(),
    "a custom gradient in a checkpoint": lambda x: layers(x, mx.checkpoint(lambda y: gate(mx.exp(y) @ y))).sum(),
    "experts of sorted rows": lambda x: experts(x, sort=True),
    "experts of rows as they come": lambda x: experts(x, sort=False),
    "frozen experts": lambda x: experts(x, sort=True, train=False),
    "vmap": lambda x: mx.vmap(lambda row: mx.tanh(row @ x).square().sum())(x).sum(),
}
FUNCTIONS |= {f"value and gradient, {name}": mx.value_and_grad(loss) for name, loss in LOSSES.items()}
FUNCTIONS |= {f"gradient alone, {name}": mx.grad(loss) for name, loss in LOSSES.items()}

OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "SGD": lambda: optim.SGD(0.1, momentum=0.9),
    "AdamW": lambda: optim.AdamW(0.1),
    "Adafactor": lambda: optim.Adafactor(0.1),
    "Muon": lambda: optim.Muon(0.1),
    "several": lambda: optim.MultiOptimizer([optim.Lion(0.1), optim.AdaDelta(0.1)], [lambda name, _: "bias" in name]),
}


class Last(nn.Module):
    """A recurrent layer's last state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def __call__(self, x: mx.array) -> mx.array:
        states = self.cell(x)
        return (states[0] if isinstance(states, tuple) else states)[:, -1]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiHeadAttention(64, 4), nn.RMSNorm(64)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.norm(x)
        return self.attention(x, x, x, nn.MultiHeadAttention.create_additive_causal_mask(x.shape[1]))


class Adapted(nn.Module):
    """A quantized layer that is not trained, between two that are."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.below, self.base, self.above = nn.Linear(256, 256), nn.Linear(256, 256, bias=False), nn.Linear(256, 8)
        self.base = self.base.to_quantized(**how)
        self.base.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return self.above(nn.relu(self.base(self.below(x))))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)
        ),
        (4, 32, 32, 3),
    ),
    "transposed convolutions": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 4, 3)), (4, 64, 4)),
    "LSTM": (lambda: Last(nn.LSTM(16, 32)), (8, 12, 16)),
    "GRU": (lambda: Last(nn.GRU(16, 32)), (8, 12, 16)),
    "attention and norms": (SelfAttention, (2, 48, 64)),
    "transformer": (lambda: nn.TransformerEncoder(2, 64, 4, checkpoint=True), (2, 48, 64)),
    "quantized to 4 bits": (lambda: Adapted(group_size=64, bits=4), (64, 256)),
    "quantized to mxfp4": (lambda: Adapted(group_size=32, bits=4, mode="mxfp4"), (64, 256)),
    "quantized to mxfp8": (lambda: Adapted(group_size=32, bits=8, mode="mxfp8"), (64, 256)),
    "quantized to nvfp4": (lambda: Adapted(group_size=16, bits=4, mode="nvfp4"), (64, 256)),
}
# Every compiled case makes the CPU backend call a C++ compiler: only those that tell something new.
COMPILED = [
    *(name for name in FUNCTIONS if "gradient" not in name),
    "value and gradient, custom gradient",
    "value and gradient, custom function with a derivative of MLX's",
    "value and gradient, a custom gradient in a checkpoint",
    "SGD",
]
CASES = [f"eager {name}" for name in (*FUNCTIONS, *OPTIMIZERS, *MODELS)] + [f"compiled {name}" for name in COMPILED]
#: Each has many kernels of its own for the C++ compiler.
LONG = ["compiled value and gradient, custom gradient", "compiled SGD"]


def case(name: str) -> tuple[Callable[[mx.array], Any], mx.array, Any]:
    """A function or a training step, what to call it with, and what it changes."""
    how, _, name = name.partition(" ")
    if name in FUNCTIONS:
        x = mx.abs(mx.sin(mx.arange(N * N, dtype=mx.float32))).reshape(N, N)
        mx.eval(x)
        return mx.compile(FUNCTIONS[name]) if how == "compiled" else FUNCTIONS[name], x, ()
    make: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64)
    )
    make, shape = MODELS.get(name, (make, (256, 128)))
    model, optimizer, x = make(), OPTIMIZERS.get(name, OPTIMIZERS["SGD"])(), mx.ones(shape)
    optimizer.init(model.trainable_parameters())
    mx.eval(x, model.parameters(), optimizer.state)
    takes_mask = isinstance(model, nn.TransformerEncoder)

    def step(x: mx.array) -> mx.array:
        def loss(model: nn.Module, x: mx.array) -> mx.array:
            return (model(x, None) if takes_mask else model(x)).square().mean()

        loss, gradients = nn.value_and_grad(model, loss)(model, x)
        optimizer.update(model, gradients)
        return loss

    held = [model.state, optimizer.state]
    return mx.compile(step, inputs=held, outputs=held) if how == "compiled" else step, x, (model, optimizer)


def measured(name: str) -> int:
    """The measured floor of a case, above what is there already."""
    gc.collect()
    before = mx.get_active_memory()
    function, x, state = case(name)
    mx.eval(function(x), list(arrays_of(state)))  # kernels are compiled now
    # The least of a few: on a busy machine the worker may fall behind for a moment, and then more is alive at once.
    return min(throttled_peak(lambda: mx.eval(function(x), list(arrays_of(state)))) for _ in range(5)) - before


@pytest.fixture(scope="module")
def floors(request: pytest.FixtureRequest) -> dict[str, int]:
    """Those of the cases that are going to run, measured where nothing else runs: see keeping_up.py."""
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = [name for name in CASES if {"name": name} in chosen]
    return json.loads(keeping_up.in_own_process(__file__, *names))


@pytest.mark.skipif(not keeping_up.CAN_KEEP_UP, reason="threads cannot choose their core here")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in CASES]
)
def test_memory_peaks_where_it_is_said_to(name: str, floors: dict[str, int]) -> None:
    function, x, state = case(name)
    estimate = estimate_memory(function, x, state=state)
    assert not estimate.unknown_operations
    assert sum(estimate.by_purpose.values()) == estimate.floor_bytes
    # Scalars and small index arrays that Python made for the call are a few hundred bytes.
    assert estimate.floor_bytes == pytest.approx(floors[name], abs=600)


def test_every_known_primitive_names_the_source_it_follows() -> None:
    assert all(source.endswith((".cpp", ".h", ".cu")) for _, source in CPU.values())


if __name__ == "__main__":
    keep_up()
    mx.set_cache_limit(0)  # a cached buffer may be two pages larger than what it is used for: much, at these sizes
    print(json.dumps({name: measured(name) for name in sys.argv[1:]}))
