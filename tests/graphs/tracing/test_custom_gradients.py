from __future__ import annotations

import mlx.core as mx

from mlx_tune.graphs import ArraySpec, estimate_memory


def test_a_custom_gradient_is_replaced_and_named() -> None:
    @mx.custom_function
    def cube(x: mx.array) -> mx.array:
        return x * x * x

    @cube.vjp
    def cube_vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        return 3 * x * x * cotangent

    estimate = estimate_memory(lambda x: mx.grad(lambda x: cube(x).sum())(x), ArraySpec((8, 8), mx.float32))
    assert list(estimate.stand_ins) == ["custom_function cube"]
    assert "custom_function cube" in str(estimate)
