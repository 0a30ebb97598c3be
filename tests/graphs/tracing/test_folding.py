from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_tune.graphs import ArraySpec, estimate_memory


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
