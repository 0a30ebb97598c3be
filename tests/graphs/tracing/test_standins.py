"""Equivalents for operations that cannot be exported: sizes of the real ones, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import mlx_tune.graphs.tracing.replaced_calls as replaced
from mlx_tune.errors import TraceError
from mlx_tune.graphs import ArraySpec, estimate_memory
from mlx_tune.graphs.tracing.custom_gradients import Marks
from mlx_tune.graphs.tracing.standins import STAND_INS
from mlx_tune.trees import arrays_of

EXPERTS, WIDTH, HIDDEN = 4, 32, 48


def expert_step(weights: mx.array, x: mx.array, indices: mx.array) -> list[mx.array]:
    """The gradient of one layer of experts for tokens sorted by expert."""

    def loss(weights: mx.array, x: mx.array) -> mx.array:
        return mx.gather_mm(x, weights, rhs_indices=indices, sorted_indices=True).square().sum()

    return list(mx.grad(loss, argnums=(0, 1))(weights, x))


@pytest.mark.parametrize("rows", [64, 61])
def test_expert_products_are_replaced_by_products_of_their_size(rows: int) -> None:
    estimate = estimate_memory(
        expert_step,
        ArraySpec((EXPERTS, WIDTH, HIDDEN), mx.float32),
        ArraySpec((rows, 1, WIDTH), mx.float32),
        ArraySpec((rows,), mx.uint32),
        backend="cpu",
    )
    assert list(estimate.stand_ins) == ["gather_mm"]
    weights, tokens, made = EXPERTS * WIDTH * HIDDEN * 4, rows * WIDTH * 4, rows * HIDDEN * 4
    # Weights, tokens, their two gradients, and the products' gradient.
    assert estimate.floor_bytes == pytest.approx(2 * weights + 2 * tokens + made, rel=0.01)


def test_a_contiguous_copy_is_replaced_by_reshapes() -> None:
    x = ArraySpec((64, 32), mx.float32)
    copied = estimate_memory(lambda x: mx.contiguous(x.T), x)
    kept = estimate_memory(lambda x: mx.contiguous(x), x)
    assert list(copied.stand_ins) == ["contiguous"]
    assert copied.floor_bytes == 2 * 64 * 32 * 4
    assert kept.floor_bytes == 64 * 32 * 4


def test_fused_attention_of_a_gpu_costs_its_inputs_output_and_gradients() -> None:
    shape = (2, 4, 256, 16)
    size = 4 * 2 * 4 * 256 * 16

    def step(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return (
                STAND_INS["ScaledDotProductAttentionVJP"]
                .function(lambda q, k, v: q * k * v, Marks(), q, k, v)
                .square()
                .sum()
            )

        return list(mx.grad(loss, argnums=(0, 1, 2))(q, k, v))

    estimate = estimate_memory(step, *[ArraySpec(shape, mx.float32)] * 3)
    # Nothing of the size of the scores, 2 x 4 x 256 x 256.
    assert 6 * size <= estimate.floor_bytes <= 9 * size


def test_fused_cross_entropy_of_a_gpu_costs_one_array_of_the_logits_size() -> None:
    def step(logits: mx.array, targets: mx.array) -> mx.array:
        def loss(logits: mx.array) -> mx.array:
            return STAND_INS["CrossEntropy"].function(None, Marks(), logits, targets).mean()

        return mx.grad(loss)(logits)

    estimate = estimate_memory(step, ArraySpec((128, 4096), mx.float32), ArraySpec((128,), mx.int32))
    assert estimate.floor_bytes == pytest.approx(2 * 128 * 4096 * 4, rel=0.01)


class Refusing:
    """MLX's exporter as on a GPU: it refuses steps that call some operations, until those have stand-ins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **refused: str) -> None:
        self.export = mx.export_function
        self.attempts = 0
        self.called: set[str] = set()
        self.refused = refused
        for name in refused:
            monkeypatch.setattr(mx.fast, name, self.watched(name, getattr(mx.fast, name)))
        monkeypatch.setattr(mx, "export_function", self.export_function)

    def watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            return original(*args, **kwargs)

        return call

    def export_function(self, *args: Any) -> None:
        self.attempts += 1
        self.called.clear()
        self.export(*args)
        for name, primitive in self.refused.items():
            if name in self.called and name not in replaced._current().stand_ins:
                raise ValueError(f"[export_function] Unable to get state for primitive {primitive}")


def trained_attention(fused: bool) -> tuple[nn.Module, optim.Optimizer, Callable[[mx.array], mx.array]]:
    """One layer of attention with a loss over a vocabulary, and its step."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.head = nn.Linear(32, 3 * 32), nn.Linear(32, 2048)

        def __call__(self, x: mx.array) -> mx.array:
            q, k, v = (y.reshape(2, 128, 4, 8).swapaxes(1, 2) for y in mx.split(self.project(x), 3, axis=-1))
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
            return self.head(y.swapaxes(1, 2).reshape(2, 128, 32))

    model, optimizer = Attention(), optim.Adam(1e-3)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)

    def loss(model: nn.Module, x: mx.array) -> mx.array:
        logits, targets = model(x), mx.zeros((2, 128), mx.int32)
        return (
            mx.fast.cross_entropy(logits, targets).mean() if fused else nn.losses.cross_entropy(logits, targets).mean()
        )

    def step(x: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model, x)
        optimizer.update(model, gradients)
        return value

    return model, optimizer, step


def test_what_a_gpu_refuses_is_traced_anew_with_stand_ins_that_hold_no_more_than_they_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = ArraySpec((2, 128, 32), mx.float32)
    model, optimizer, step = trained_attention(fused=False)
    unfused = estimate_memory(step, x, state=(model, optimizer), backend="cpu")
    model, optimizer, step = trained_attention(fused=True)
    before = [a.tolist() for a in arrays_of((model, optimizer))]
    refusing = Refusing(
        monkeypatch, cross_entropy="CrossEntropy", scaled_dot_product_attention="ScaledDotProductAttentionVJP"
    )
    estimate = estimate_memory(step, x, state=(model, optimizer), backend="cpu")
    assert refusing.attempts == 3  # one for each operation, and the one that went through
    assert set(estimate.stand_ins) == {"cross_entropy", "scaled_dot_product_attention"}
    assert "Stand-in for scaled_dot_product_attention" in str(estimate)
    assert estimate.unknown_operations == {}
    assert [a.tolist() for a in arrays_of((model, optimizer))] == before
    # The fused loss saves arrays of the logits' size, fused attention those of the scores' size.
    logits, scores = 2 * 128 * 2048 * 4, 2 * 4 * 128 * 128 * 4
    assert unfused.floor_bytes - estimate.floor_bytes > logits
    assert estimate.floor_bytes > estimate.start_bytes + 2 * logits
    shapes = [owner.shape for owner in estimate.peak_owners]
    assert not any(len(shape) > 3 and shape[-2:] == (128, 128) for shape in shapes), scores


def test_a_refusal_that_a_stand_in_does_not_help_is_the_user_s_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    Refusing(monkeypatch, cross_entropy="SomethingNew")
    model, optimizer, step = trained_attention(fused=True)
    with pytest.raises(TraceError, match=r"operation SomethingNew, which MLX cannot describe.*autobatch\(\)"):
        estimate_memory(step, ArraySpec((2, 128, 32), mx.float32), state=(model, optimizer), backend="cpu")


def test_gated_delta_is_made_of_single_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    q, v, gates = (ArraySpec(shape, mx.float32) for shape in ((1, 64, 2, 32), (1, 64, 2, 32), (1, 64, 2)))

    def step(*args: mx.array) -> mx.array:
        return mx.grad(lambda q, *args: mx.fast.gated_delta_update(q, *args)[0].sum())(*args)

    plain = estimate_memory(step, q, q, v, gates, gates)
    Refusing(monkeypatch, gated_delta_update="GatedDeltaUpdateVJP")
    estimate = estimate_memory(step, q, q, v, gates, gates)
    assert "gated_delta_update" in estimate.stand_ins
    assert estimate.floor_bytes == plain.floor_bytes
