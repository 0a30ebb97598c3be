"""Equivalents for operations that cannot be exported: sizes of the real ones, and named."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_tune.errors import TraceError
from mlx_tune.graphs import ArraySpec, estimate_memory
from mlx_tune.graphs.interception import Interception, intercepted
from mlx_tune.graphs.recomputation import tracing
from mlx_tune.graphs.standins import STAND_INS

EXPERTS, WIDTH, HIDDEN = 4, 32, 48


def expert_step(weights: mx.array, x: mx.array, indices: mx.array) -> list[mx.array]:
    """The gradient of one layer of experts for tokens sorted by expert."""

    def loss(weights: mx.array, x: mx.array) -> mx.array:
        return mx.gather_mm(x, weights, rhs_indices=indices, sorted_indices=True).square().sum()

    return list(mx.grad(loss, argnums=(0, 1))(weights, x))


@pytest.mark.parametrize("rows", [64, 61])
def test_expert_products_are_replaced_by_a_batched_product_of_their_size(rows: int) -> None:
    estimate = estimate_memory(
        expert_step,
        ArraySpec((EXPERTS, WIDTH, HIDDEN), mx.float32),
        ArraySpec((rows, 1, WIDTH), mx.float32),
        ArraySpec((rows,), mx.uint32),
    )
    assert list(estimate.stand_ins) == ["gather_mm"]
    weights, tokens, made = EXPERTS * WIDTH * HIDDEN * 4, rows * WIDTH * 4, rows * HIDDEN * 4
    # Weights, tokens, their two gradients, and the products' gradient; padding to whole experts adds some rows.
    assert estimate.floor_bytes == pytest.approx(2 * weights + 2 * tokens + made, rel=0.01 if rows == 64 else 0.25)


def test_a_contiguous_copy_is_replaced_by_reshapes() -> None:
    x = ArraySpec((64, 32), mx.float32)
    copied = estimate_memory(lambda x: mx.contiguous(x.T), x)
    kept = estimate_memory(lambda x: mx.contiguous(x), x)
    assert list(copied.stand_ins) == ["contiguous"]
    assert copied.floor_bytes == 2 * 64 * 32 * 4
    assert kept.floor_bytes == 64 * 32 * 4


def test_nothing_is_replaced_where_nothing_is_refused() -> None:
    logits, targets = ArraySpec((64, 512), mx.float32), ArraySpec((64,), mx.int32)
    estimate = estimate_memory(lambda x, t: nn.losses.cross_entropy(x, t).sum(), logits, targets)
    assert estimate.stand_ins == {}


def test_an_operation_without_a_stand_in_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match="operation BitwiseInvert"):
        estimate_memory(lambda x: mx.bitwise_invert(x), ArraySpec((4,), mx.int32))


def test_fused_attention_of_a_gpu_costs_its_inputs_output_and_gradients() -> None:
    shape = (2, 4, 256, 16)
    size = 4 * 2 * 4 * 256 * 16

    def step(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return STAND_INS["ScaledDotProductAttentionVJP"].function(lambda q, k, v: q * k * v, q, k, v).square().sum()

        return list(mx.grad(loss, argnums=(0, 1, 2))(q, k, v))

    estimate = estimate_memory(step, *[ArraySpec(shape, mx.float32)] * 3)
    # Nothing of the size of the scores, 2 x 4 x 256 x 256.
    assert 6 * size <= estimate.floor_bytes <= 9 * size


def test_fused_cross_entropy_of_a_gpu_costs_one_array_of_the_logits_size() -> None:
    def step(logits: mx.array, targets: mx.array) -> mx.array:
        def loss(logits: mx.array) -> mx.array:
            return STAND_INS["CrossEntropy"].function(None, logits, targets).mean()

        return mx.grad(loss)(logits)

    estimate = estimate_memory(step, ArraySpec((128, 4096), mx.float32), ArraySpec((128,), mx.int32))
    assert estimate.floor_bytes == pytest.approx(2 * 128 * 4096 * 4, rel=0.01)


def test_a_stand_in_is_used_only_where_it_was_asked_for() -> None:
    original = mx.contiguous
    with tracing(), intercepted(Interception()):
        assert mx.contiguous is not original
        text: list[str] = []
        mx.export_to_dot(type("Writer", (), {"write": staticmethod(text.append)}), mx.contiguous(mx.zeros((2, 3)).T))
        assert "Contiguous" in "".join(text)
    assert mx.contiguous is original
