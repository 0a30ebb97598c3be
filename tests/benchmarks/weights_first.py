"""Weight gradients of checkpointed blocks before the block below runs again: floors and times beside the old order.

    python tests/benchmarks/weights_first.py [--turns N] [--large] [--only NAME ...]

MLX's own order, which `mx.checkpoint` has, evaluates the input gradients of all blocks first. Both orders take the same
compiled step on the same model in turns. The floor is what a step holds above what was there before, the least of three
under a memory limit of one byte; ratios are the median of the turns' own. `--large` takes the shape of a Qwen3 of 0.6 B
parameters with 4 x 2,048 tokens, on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models import qwen3
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_tune as mt
from mlx_tune.checkpointing.block.weights_first import WeightsFirst
from mlx_tune.losses.splitting import split_head
from mlx_tune.presentation.tables import render_table

SMALL = {"blocks": 8, "rows": 4, "length": 256, "width": 128, "wide": 2048, "vocabulary": 2000, "head": 16}
LARGE = {"blocks": 28, "rows": 4, "length": 2048, "width": 1024, "wide": 3072, "vocabulary": 151_936, "head": 128}
LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEAR += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@contextmanager
def in_the_old_order() -> Iterator[None]:
    """Let nothing wait for weight gradients in the calls of the body, as it was until 29 November 2026."""
    plain = WeightsFirst.__init__
    WeightsFirst.__init__ = lambda self, *_: plain(self, set(), set())  # type: ignore[method-assign]
    try:
        yield
    finally:
        WeightsFirst.__init__ = plain  # type: ignore[method-assign]


def chain() -> tuple[Callable[[mx.array], mx.array], Any, mx.array]:
    """A chain of MLPs sixteen times as wide as their rows, all weights trained by SGD."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 1024, bias=False), nn.Linear(1024, 64, bias=False)

        def __call__(self, x: mx.array) -> mx.array:
            return x + self.down(nn.silu(self.up(x)))

    model = nn.Sequential(*(Block() for _ in range(12)))
    return trained(model, optim.SGD(0.1), lambda m, x: m(x).square().mean(), mx.random.normal((1024, 64)))


def language(size: dict[str, int], lora: bool) -> tuple[Callable[[mx.array], mx.array], Any, mx.array]:
    """A Qwen3, by LoRA of rank 8 on every linear layer or all weights of its blocks; the loss holds no logits."""
    model = qwen3.Model(
        qwen3.ModelArgs(
            model_type="qwen3",
            hidden_size=size["width"],
            num_hidden_layers=size["blocks"],
            intermediate_size=size["wide"],
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=size["head"],
            rms_norm_eps=1e-6,
            vocab_size=size["vocabulary"],
            max_position_embeddings=4096,
            rope_theta=1e6,
            tie_word_embeddings=True,
        )
    )
    if size is LARGE:
        model.set_dtype(mx.bfloat16)
    model.freeze()
    if lora:
        linear_to_lora_layers(model, size["blocks"], {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": LINEAR})
    else:
        for layer in model.layers:
            layer.unfreeze()
    split = split_head(model)

    def loss(model: nn.Module, x: mx.array) -> mx.array:
        return mt.linear_cross_entropy(split.states(model, x[:, :-1]), split.layer, x[:, 1:])

    tokens = mx.random.randint(0, size["vocabulary"], (size["rows"], size["length"] + 1))
    return trained(model, optim.Adam(1e-5), loss, tokens)


def trained(
    model: nn.Module, optimizer: optim.Optimizer, loss: Callable[[Any, mx.array], mx.array], batch: mx.array
) -> tuple[Callable[[mx.array], mx.array], Any, mx.array]:
    """The step of a model with every block checkpointed, not compiled yet."""
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state, batch)
    mt.checkpoint_blocks(model)
    gradient = nn.value_and_grad(model, loss)

    def step(batch: mx.array) -> mx.array:
        value, gradients = gradient(model, batch)
        optimizer.update(model, gradients)
        return value

    return step, (model, optimizer), batch


def compared(name: str, made: tuple[Callable[[mx.array], mx.array], Any, mx.array], turns: int) -> list[list[str]]:
    """A row for each order."""
    step, (model, optimizer), batch = made
    state = [model.state, optimizer.state]

    def old(batch: mx.array) -> mx.array:
        with in_the_old_order():
            return step(batch)

    ways = {"old": mx.compile(old, inputs=state, outputs=state), "new": mx.compile(step, inputs=state, outputs=state)}

    def taken(way: str) -> tuple[float, int]:
        gc.collect()
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter()
        mx.eval(ways[way](batch), state)
        mx.synchronize()
        return time.perf_counter() - start, mx.get_peak_memory() - before

    floors: dict[str, list[int]] = {}
    predicted: dict[str, int] = {}
    for way, compiled in ways.items():
        estimate = mt.estimate_memory(compiled, batch, state=(model, optimizer))
        predicted[way] = estimate.floor_bytes - estimate.start_bytes
        taken(way)
        with mt.memory_limit(1):
            floors[way] = [taken(way)[1] for _ in range(3)]
    runs: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
    for turn in range(turns):
        for way in list(ways) if turn % 2 else list(ways)[::-1]:
            runs[way].append(taken(way))
    rows = []
    for way in ways:
        ratios = sorted(new[0] / before[0] for new, before in zip(runs[way], runs["old"], strict=True))
        low, middle, high = statistics.quantiles(ratios) if turns > 1 else ratios * 3
        figures = predicted[way], min(floors[way]), max(peak for _, peak in runs[way])
        seconds = statistics.median(run[0] for run in runs[way])
        times = [f"{seconds:.3f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"]
        rows.append([name, way, *map(mt.format_bytes, figures), *times])
    return rows


def main() -> None:
    """Print a table of both orders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9, help="timed steps of each order")
    parser.add_argument("--large", action="store_true", help="the shape of a Qwen3 of 0.6 B parameters, on a GPU")
    parser.add_argument("--only", nargs="+", default=["chain", "LoRA", "full"], help="chain, LoRA, full")
    arguments = parser.parse_args()
    size = LARGE if arguments.large else SMALL
    makers = {"chain": chain, "LoRA": lambda: language(size, True), "full": lambda: language(size, False)}
    rows = []
    for name in arguments.only:
        mx.random.seed(0)
        rows += compared(name, makers[name](), arguments.turns)
    columns = [
        "step",
        "order",
        "floor, predicted",
        "floor, measured",
        "without a limit",
        "seconds",
        "over old (quartiles)",
    ]
    print(render_table(columns, rows))


if __name__ == "__main__":
    main()
