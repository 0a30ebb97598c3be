"""What long rows cost with and without tiles: floors by the graph and by real steps, and seconds.

    python tests/benchmarks/tile.py [--lengths 2048 4096] [--predict-only]
    python tests/benchmarks/tile.py --large --backend metal --tokens 4096 --lengths 13056 34016 57344
    python tests/benchmarks/tile.py --large --limit 40GB --tokens 4096 --lengths 24064 72192     # on a GPU
    python tests/benchmarks/tile.py --large --batches 40GB --lengths 2048                        # on a GPU

LoRA steps of a small Llama (width 128, MLP 4,096, one head, 4 blocks, vocabulary 8,000, float32) on one row, compiled,
every block checkpointed but in the first way. `floor` is the least that a step holds above what was there before:
predicted, and measured under a memory limit of one byte. With --large only predicted, for a backend: LoRA of all blocks
of the 0.6 B shape of loss.py, every block checkpointed, the loss without logits, with tiles and without. With --limit
steps of that shape are run, each way but the plain one: under that limit, and under one of one byte. With --batches the
largest batch of rows is searched for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import loss
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.presentation.tables import render_table

WAYS = ("plain", "checkpoint", "checkpoint, loss", "checkpoint, loss, tile")


def llama_shape(blocks: int = 4, width: int = 128, wide: int = 4096, vocabulary: int = 8_000) -> nn.Module:
    """A Llama of a given shape, random."""
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=width,
            num_hidden_layers=blocks,
            intermediate_size=wide,
            num_attention_heads=width // 128,
            num_key_value_heads=width // 128,
            rms_norm_eps=1e-5,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
        )
    )


def made(
    way: str, model: Any, tokens: int = 256, chunk_tokens: int | None = 256
) -> tuple[Callable[[mx.array], mx.array], Any]:
    """A compiled training step in one of the ways, and what it changes."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 20.0, "dropout": 0.0})
    optimizer = optim.Adam(1e-4)
    optimizer.init(model.trainable_parameters())
    model.train()
    if "checkpoint" in way:
        mt.checkpoint_blocks(model)
    if "tile" in way:
        mt.tile_blocks(model, tokens)

    def loss_of(model: Any, row: mx.array) -> mx.array:
        hidden, table = model.model(row[:, :-1]), model.model.embed_tokens
        if "loss" in way:
            return mt.linear_cross_entropy(hidden, table, row[:, 1:], chunk_tokens=chunk_tokens)
        return nn.losses.cross_entropy(table.as_linear(hidden).astype(mx.float32), row[:, 1:], reduction="mean")

    grad = nn.value_and_grad(model, loss_of)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(row: mx.array) -> mx.array:
        value, gradients = grad(model, row)
        optimizer.update(model, gradients)
        return value

    return step, (model, optimizer)


def measured(step: Callable[[mx.array], mx.array], state: Any, row: mx.array) -> tuple[float, int, float]:
    """The loss of a step, what it held above what was there before, and its seconds."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    value = step(row)
    mx.eval(value, [part.state for part in state])
    mx.synchronize()
    return value.item(), mx.get_peak_memory() - before, time.perf_counter() - began


def large_floors(lengths: list[int], tokens: int, backend: str | None) -> None:
    """The floor of one row of each length through the 0.6 B shape, in pieces and whole; no step is run."""
    model = loss.qwen_shape(28)
    optimizer = loss.lora(model)
    mx.eval(model.parameters())  # tiles are tried on real values
    table = []
    for length in lengths:
        data = [([7919 * i % 151_936 for i in range(length)], 0)]
        args = TrainingArgs(batch_size=1, max_seq_length=length, grad_checkpoint=True)

        def floor(data: Any = data, args: TrainingArgs = args) -> str:
            found = lm.estimate_memory(model, data, args, optimizer=optimizer, backend=backend)
            return mt.format_bytes(found.floor_bytes)

        whole = floor()
        with mt.tile_blocks(model, tokens):
            table.append((f"{length:,}", whole, floor()))
        print(*table[-1], flush=True)
    print(
        render_table(("tokens", "whole", f"in pieces of {tokens:,}"), table, title=f"floors, predicted for {backend}")
    )


def large_steps(lengths: list[int], tokens: int, limit: str, turns: int) -> None:
    """Real steps on one row of each length through the 0.6 B shape; the first one compiles."""
    for way in WAYS[1:]:
        step, state = made(way, loss.qwen_shape(28), tokens, None)
        mx.eval([part.state for part in state])
        for length in lengths:
            row = mx.random.randint(0, 151_936, (1, length + 1), key=mx.random.key(0))
            with mt.memory_limit(limit):
                first = measured(step, state, row)
                free = [measured(step, state, row) for _ in range(turns)]
            with mt.memory_limit(1):
                held = measured(step, state, row)
            seconds = sorted(turn[2] for turn in free)
            print(
                f"{way}, 1 x {length:,}: loss {first[0]:.4f}, under {limit} {mt.format_bytes(max(t[1] for t in free))} "
                f"and {statistics.median(seconds):.3f} s ({seconds[0]:.3f} to {seconds[-1]:.3f}), "
                f"held back {mt.format_bytes(held[1])} and {held[2]:.3f} s",
                flush=True,
            )


def large_batches(length: int, budget: str) -> None:
    """The largest batch of rows of one length through the 0.6 B shape."""
    for way in WAYS[1:3]:
        step, state = made(way, loss.qwen_shape(28), chunk_tokens=None)
        mx.eval([part.state for part in state])

        def make_batch(n: int) -> mx.array:
            return mx.random.randint(0, 151_936, (n, length + 1), key=mx.random.key(0))

        found = mt.autobatch(step, make_batch, budget=budget, state=state, progress=False)
        print(f"{way}, rows of {length:,}:\n{found}", flush=True)


def main() -> None:
    """Print a table for each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="positions in a piece")
    parser.add_argument("--most", default="3GB", help="run no step that is predicted to hold more")
    parser.add_argument("--predict-only", action="store_true")
    parser.add_argument("--large", action="store_true", help="floors of the 0.6 B shape, predicted")
    parser.add_argument("--backend", choices=["cpu", "cuda", "metal"], help="for --large; this machine's by default")
    parser.add_argument("--limit", help="for --large: run steps under this limit")
    parser.add_argument("--batches", metavar="BUDGET", help="for --large: the largest batch within it")
    options = parser.parse_args()
    if options.large and options.limit:
        large_steps(options.lengths, options.tokens, options.limit, options.turns)
        return
    if options.large and options.batches:
        large_batches(options.lengths[0], options.batches)
        return
    if options.large:
        large_floors(options.lengths, options.tokens, options.backend)
        return
    for length in options.lengths:
        table = []
        row = mx.random.randint(0, 8_000, (1, length + 1), key=mx.random.key(0))
        for way in WAYS:
            mx.random.seed(0)
            step, state = made(way, llama_shape(), options.tokens)
            mx.eval([part.state for part in state])
            found = mt.estimate_memory(step, row, state=state)
            own = found.floor_bytes - found.start_bytes
            line = [way, mt.format_bytes(own), f"{found.trace_seconds:.1f} s"]
            if options.predict_only or own > mt.parse_bytes(options.most):
                table.append((*line, "not run", "", "", ""))
                continue
            value = measured(step, state, row)[0]
            with mt.memory_limit(1):
                held = min(measured(step, state, row)[1] for _ in range(2))
            free = [measured(step, state, row) for _ in range(options.turns)]
            seconds = statistics.median(turn[2] for turn in free)
            figures = (mt.format_bytes(held), mt.format_bytes(max(turn[1] for turn in free)), f"{seconds:.2f}")
            table.append((*line, *figures, f"{value:.5f}"))
            print(*table[-1], flush=True)
        columns = ("way", "floor, predicted", "in", "floor, measured", "free", "seconds", "first loss")
        print(render_table(columns, table, title=f"1 x {length} tokens, {mx.default_device()}"), flush=True)


if __name__ == "__main__":
    main()
