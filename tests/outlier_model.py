"""A model with a few channels of large inputs, as language models have."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

import mlx_tune as mt

WIDTH, VOCABULARY = 128, 200


LARGE = (3, 40)


class Block(nn.Module):
    """A feed-forward part that adds to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(nn.silu(self.up(self.norm(x))))


class Outliers(nn.Module):
    """A residual stream in which two channels are far larger than all others, and the weights that they meet small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = [Block() for _ in range(4)]
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        keys = iter(mx.random.split(mx.random.key(1), 16))
        columns = mx.where(sum(mx.arange(WIDTH) == j for j in LARGE) > 0, 1.0, 0.0)
        self.embed.weight = mx.random.normal(self.embed.weight.shape, key=next(keys)) + 40 * columns
        for block in self.blocks:
            small = 1 - 0.99 * columns
            block.up.weight = mx.random.normal(block.up.weight.shape, key=next(keys)) * small * 0.5
            block.down.weight = mx.random.normal(block.down.weight.shape, key=next(keys)) * 0.1
        self.head.weight = mx.random.normal(self.head.weight.shape, key=next(keys)) * (1 - 0.99 * columns) * 0.15
        self.set_dtype(mx.bfloat16)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens(seed: int, rows: int = 8) -> mx.array:
    return mx.random.randint(0, VOCABULARY, (rows, 33), key=mx.random.key(seed))


def divergence(bits: int, method: str, **more: object) -> float:
    report = mt.quantize_model(
        Outliers(), bits, 64, method=method, skip="embed", evaluation=[tokens(5)], progress=False, **more
    )  # type: ignore[arg-type]
    return report.accuracy.mean_kl  # type: ignore[union-attr]
