"""Simulated memory against the measured floor, operation by operation."""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlx_tune.graphs import estimate_memory
from mlx_tune.graphs.primitives import CPU

pytestmark = pytest.mark.cpu_only

N = 96


def measured_floor(run: Callable[[], list[mx.array]], held: int, runs: int = 5) -> int:
    """The smallest peak of several throttled evaluations, with `held` bytes for what exists beforehand."""
    peaks = []
    gc.collect()
    for _ in range(runs):
        mx.clear_cache()
        before = mx.get_active_memory()
        previous = mx.set_memory_limit(1)
        mx.reset_peak_memory()
        try:
            mx.eval(run())
            mx.synchronize()
        finally:
            mx.set_memory_limit(previous)
        peaks.append(mx.get_peak_memory() - before + held)
    return min(peaks)


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


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_one_operation_peaks_where_it_is_said_to(name: str, compiled: bool) -> None:
    function = mx.compile(FUNCTIONS[name]) if compiled else FUNCTIONS[name]
    x = mx.abs(mx.sin(mx.arange(N * N, dtype=mx.float32))).reshape(N, N)
    mx.eval(x)
    estimate = estimate_memory(function, x)
    assert not estimate.unknown_operations
    mx.eval(function(x))
    truth = measured_floor(lambda: [function(x)], held=x.nbytes)
    # Scalars and small index arrays that Python made for the call are a few hundred bytes.
    assert estimate.floor_bytes == pytest.approx(truth, rel=0.005, abs=1000)


@pytest.mark.parametrize("optimizer", [optim.SGD(0.1, momentum=0.9), optim.AdamW(0.1), optim.Adafactor(0.1)])
def test_a_training_step_peaks_where_it_is_said_to(optimizer: optim.Optimizer) -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))
    optimizer.init(model.trainable_parameters())
    x = mx.ones((256, 128))
    mx.eval(x, model.parameters(), optimizer.state)

    def step(x: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x)
        optimizer.update(model, gradients)
        return loss

    estimate = estimate_memory(step, x, state=(model, optimizer))

    def run() -> list[mx.array]:
        return [step(x), model.parameters(), optimizer.state]

    truth = measured_floor(run, held=estimate.start_bytes)
    assert estimate.floor_bytes == pytest.approx(truth, rel=0.01)
    assert sum(estimate.by_purpose.values()) == estimate.floor_bytes


def test_every_known_primitive_names_the_source_it_follows() -> None:
    assert all(source.endswith((".cpp", ".h", ".cu")) for _, source in CPU.values())
