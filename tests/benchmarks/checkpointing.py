"""What checkpointing saves and costs on an mlx-lm Llama: peak memory and step time, several ways side by side.

    python tests/benchmarks/checkpointing.py [--quick] [--rounds N] [--clock wall|cpu] [--json FILE]

Every way trains the same model on the same batch. Steps of the ways are taken in turn, so that a busy machine slows
all of them; times are the median of the rounds, ratios are the median of the rounds' own ratios. Peaks are what the
allocator counted above the weights. `--clock cpu` counts the seconds that the processor worked for this process
instead of those that passed, which is the better figure where others use the same processor. Ways:

- plain: no checkpointing
- mx.checkpoint: applied to each block's parameters and inputs, by hand
- mlx-lm: `mlx_lm.tuner.trainer.grad_checkpoint`
- ours: `mlx_tune.checkpoint_blocks(model)`, with every=2, and with what attention gives out kept
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import grad_checkpoint

import mlx_tune as mt
from mlx_tune.presentation.tables import render_table

SIZES = {
    "full": {"hidden": 192, "layers": 6, "vocabulary": 1024, "batch": 2, "length": 257},
    "quick": {"hidden": 64, "layers": 4, "vocabulary": 128, "batch": 2, "length": 65},
}


class MarkedBlock(llama.TransformerBlock):
    """The block of mlx-lm, with what attention gives out marked."""

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + mt.keep(self.self_attn(self.input_layernorm(x), mask, cache), "attention")
        return h + self.mlp(self.post_attention_layernorm(h))


def by_hand(block: nn.Module) -> None:
    """`mx.checkpoint` over one block's parameters and inputs, as mlx-lm does it, for this instance only."""
    plain = type(block)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            return plain.__call__(self, *args, **kwargs)

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    block.__class__ = type(plain.__name__, (plain,), {"__call__": call})


def with_mlx_lm(model: llama.Model) -> None:
    """mlx-lm changes the class of the first block: give this model's blocks a class of their own."""
    own = type("TransformerBlock", (llama.TransformerBlock,), {"__call__": llama.TransformerBlock.__call__})
    for layer in model.layers:
        layer.__class__ = own
    grad_checkpoint(model.layers[0])


def with_marks(model: llama.Model) -> None:
    for layer in model.layers:
        layer.__class__ = MarkedBlock
    mt.checkpoint_blocks(model, keep=["attention"])


WAYS: dict[str, Callable[[llama.Model], Any]] = {
    "plain": lambda model: None,
    "mx.checkpoint": lambda model: [by_hand(layer) for layer in model.layers],
    "mlx-lm": with_mlx_lm,
    "ours": mt.checkpoint_blocks,
    "ours, every 2nd": lambda model: mt.checkpoint_blocks(model, every=2),
    "ours, keep": with_marks,
}


class Trainer:
    """One model with its step."""

    def __init__(self, way: str, size: dict[str, int], compiled: bool) -> None:
        mx.random.seed(0)
        width = size["hidden"]
        self.model = llama.Model(
            llama.ModelArgs(
                model_type="llama",
                hidden_size=width,
                num_hidden_layers=size["layers"],
                intermediate_size=3 * width,
                num_attention_heads=4,
                num_key_value_heads=2,
                rms_norm_eps=1e-5,
                vocab_size=size["vocabulary"],
            )
        )
        WAYS[way](self.model)
        optimizer = optim.SGD(learning_rate=1e-3)
        optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, optimizer.state, mx.random.state]
        mx.eval(self.state)
        gradient = nn.value_and_grad(self.model, self.loss)

        def step(tokens: mx.array) -> mx.array:
            value, grads = gradient(tokens)
            optimizer.update(self.model, grads)
            return value

        self.step = mx.compile(step, inputs=self.state, outputs=self.state) if compiled else step

    def loss(self, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(self.model(tokens[:, :-1]), tokens[:, 1:]).mean()

    def run(self, tokens: mx.array, clock: Callable[[], float] = time.perf_counter) -> float:
        start = clock()
        mx.eval(self.step(tokens), self.state)
        return clock() - start

    def peak(self, tokens: mx.array, limit: int | None) -> int:
        """Of three steps, the least: how far MLX runs ahead differs from step to step."""
        peaks = []
        for _ in range(3):
            before = mx.get_active_memory()
            with mt.track_memory() as memory:
                if limit is None:
                    self.run(tokens)
                else:
                    with mt.memory_limit(before + limit):
                        self.run(tokens)
            peaks.append(memory.peak_bytes - before)
        return min(peaks)


def measure(size: dict[str, int], rounds: int, compiled: bool, clock: Callable[[], float]) -> list[dict[str, Any]]:
    tokens = mx.random.randint(0, size["vocabulary"], (size["batch"], size["length"]), key=mx.random.key(1))
    trainers = {way: Trainer(way, size, compiled) for way in WAYS}
    for trainer in trainers.values():
        trainer.run(tokens)
    free = {way: trainer.peak(tokens, None) for way, trainer in trainers.items()}
    limit = free["plain"] // 4
    limited = {way: trainer.peak(tokens, limit) for way, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    under: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, trainer in trainers.items():
            seconds[way].append(trainer.run(tokens, clock))
    for _ in range(max(1, rounds // 2)):
        for way, trainer in trainers.items():
            with mt.memory_limit(mx.get_active_memory() + limit):
                under[way].append(trainer.run(tokens, clock))

    def ratio(way: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[way], seconds[to], strict=True))

    return [
        {
            "way": way,
            "compiled": compiled,
            "peak_bytes": free[way],
            "limit_bytes": limit,
            "peak_under_limit_bytes": limited[way],
            "seconds": statistics.median(seconds[way]),
            "seconds_under_limit": statistics.median(under[way]),
            "time_to_plain": ratio(way, "plain"),
            "time_to_mx_checkpoint": ratio(way, "mx.checkpoint"),
        }
        for way in WAYS
    ]


def building(size: dict[str, int], rounds: int) -> dict[str, float]:
    """Processor milliseconds a block to build one eager step's graph, with nothing evaluated: all that Python costs."""
    tokens = mx.random.randint(0, size["vocabulary"], (size["batch"], size["length"]), key=mx.random.key(1))
    trainers = {way: Trainer(way, size, compiled=False) for way in ("plain", "mx.checkpoint", "mlx-lm", "ours")}
    gradients = {way: nn.value_and_grad(trainer.model, trainer.loss) for way, trainer in trainers.items()}
    found: dict[str, list[float]] = {way: [] for way in trainers}
    for _ in range(rounds):
        for way, gradient in gradients.items():
            start = time.process_time()
            gradient(tokens)
            found[way].append((time.process_time() - start) * 1e3 / size["layers"])
    return {way: statistics.median(times) for way, times in found.items()}


def table(rows: list[dict[str, Any]], size: dict[str, int], clock: str) -> str:
    return render_table(
        ["way", "peak", "s a step", "x plain", "x mx.checkpoint", "peak under limit", "s under limit"],
        [
            (
                row["way"],
                mt.format_bytes(row["peak_bytes"]),
                f"{row['seconds']:.3f}",
                f"{row['time_to_plain']:.2f}",
                f"{row['time_to_mx_checkpoint']:.3f}",
                mt.format_bytes(row["peak_under_limit_bytes"]),
                f"{row['seconds_under_limit']:.3f}",
            )
            for row in rows
        ],
        title=f"Llama {size}, {'compiled' if rows[0]['compiled'] else 'eager'}, {clock} seconds",
        notes=[f"limit: {mt.format_bytes(rows[0]['limit_bytes'])} above the weights"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="which seconds to count")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    name = "quick" if arguments.quick else "full"
    size, rounds = SIZES[name], 3 if arguments.quick else arguments.rounds
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    found = []
    for compiled in (False, True):
        rows = measure(size, rounds, compiled, clock)
        found += rows
        print(table(rows, size, arguments.clock), end="\n\n", flush=True)
    built = building(size, 5 * rounds)
    print(
        render_table(
            ["way", "ms a block", "above mx.checkpoint"],
            [
                (way, f"{milliseconds:.2f}", f"{milliseconds - built['mx.checkpoint']:+.2f}")
                for way, milliseconds in built.items()
            ],
            title="Building the graph of an eager step: processor time, nothing evaluated",
        )
    )
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {
                    "size": size,
                    "rounds": rounds,
                    "clock": arguments.clock,
                    "ways": found,
                    "building_milliseconds": built,
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
