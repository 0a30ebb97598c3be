"""What the loss costs with its logits held and without: floors by the graph, and real steps.

    python tests/benchmarks/loss.py [--backend cuda] [--model PATH] [--quick]
    python tests/benchmarks/loss.py --trainer [--large] [--quick]
    python tests/benchmarks/loss.py --dwq [--quick]

First the floors of LoRA steps on a 0.6 B shape (width 1,024, 28 blocks, vocabulary 151,936, tied, bfloat16, every block
checkpointed, 4 x 2,048 tokens) as the graph has them, which allocates nothing; then, with --model, steps of a real
model that mlx-lm loads, in turns: LoRA of rank 8 and full fine-tuning. With --trainer, mlx-lm's own step as `lm.train`
has it, with mlx-lm's loss and without its logits: a small Llama, a large vocabulary, LoRA, every block checkpointed;
with --large the 0.6 B shape, which needs a GPU.
With --dwq, the gradient of one step of "dwq" on the same model at 3 bits, with the logits of both models and without.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers
from workload_models import language_model

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.losses.splitting import split_head
from mlx_tune.presentation.tables import render_table
from mlx_tune.quantization.learning.distance import Distance
from mlx_tune.quantization.learning.dwq import _answers
from mlx_tune.quantization.learning.trainable import NAMES, made_dense, trainable_sites, trained_in_place
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.models.stored_outputs import OutputStore


def plain(hidden: mx.array, head: nn.Module, targets: mx.array) -> mx.array:
    """The loss that holds all logits."""
    return nn.losses.cross_entropy(head.as_linear(hidden).astype(mx.float32), targets, reduction="mean")


def chunked(hidden: mx.array, head: nn.Module, targets: mx.array) -> mx.array:
    """Sixteen plain checkpointed chunks, in no order."""

    def one(h: mx.array, t: mx.array) -> mx.array:
        return mx.checkpoint(lambda h: nn.losses.cross_entropy(head.as_linear(h).astype(mx.float32), t))(h)

    parts = zip(mx.split(hidden.reshape(-1, hidden.shape[-1]), 16), mx.split(targets.reshape(-1), 16), strict=True)
    return mx.concatenate([one(h, t) for h, t in parts]).mean()


LOSSES: dict[str, Callable[..., mx.array]] = {
    "plain": plain,
    "16 checkpointed chunks": chunked,
    "linear_cross_entropy": mt.linear_cross_entropy,
}


def step_of(model: Any, loss: Callable[..., mx.array], optimizer: optim.Optimizer) -> Callable[[mx.array], mx.array]:
    """A training step on tokens `[rows, length]`; the table of tokens is the head."""

    def loss_of(model: Any, tokens: mx.array) -> mx.array:
        return loss(model.model(tokens[:, :-1]), model.model.embed_tokens, tokens[:, 1:])

    grad = nn.value_and_grad(model, loss_of)

    def step(tokens: mx.array) -> mx.array:
        value, gradients = grad(model, tokens)
        optimizer.update(model, gradients)
        return value

    return step


def qwen_shape(blocks: int) -> nn.Module:
    """A Qwen3 of 0.6 B parameters, never evaluated."""
    from mlx_lm.models import qwen3

    arguments = qwen3.ModelArgs(
        model_type="qwen3", hidden_size=1024, num_hidden_layers=blocks, intermediate_size=3072, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, vocab_size=151936, max_position_embeddings=4096,
        rope_theta=1e6, tie_word_embeddings=True,
    )  # fmt: skip
    model = qwen3.Model(arguments)
    model.set_dtype(mx.bfloat16)
    return model


def lora(model: nn.Module) -> optim.Optimizer:
    """Adapters of rank 8 in every block, and their optimizer."""
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 20.0, "dropout": 0.0})
    return optim.Adam(1e-4)


def floors(blocks: int, rows: int, length: int, backend: str | None) -> None:
    """The table of floors."""
    table = []
    for name, loss in LOSSES.items():
        model = qwen_shape(blocks)
        optimizer = lora(model)
        model.train()
        mt.checkpoint_blocks(model)
        tokens = mt.ArraySpec((rows, length + 1), mx.int32)
        found = mt.estimate_memory(step_of(model, loss, optimizer), tokens, state=(model, optimizer), backend=backend)
        sizes = found.floor_bytes, found.floor_bytes - found.start_bytes, found.peak_bytes
        table.append((name, *map(mt.format_bytes, sizes), f"{found.trace_seconds:.1f}"))
        print(*table[-1], flush=True)
    columns = ("loss", "floor, predicted", "of which the step", "free, predicted", "seconds to predict")
    title = f"LoRA, {blocks} blocks, {rows} x {length} tokens, {backend or 'this backend'}"
    print(render_table(columns, table, title=title))


def steps(path: str, rows: int, length: int, turns: int) -> None:
    """Real steps in turns: the least peak under a limit of one byte, the peak and the time without."""
    from mlx_lm import load

    tokens = np.load(f"{path}/calibration_tokens.npy")[: rows * (length + 1)].reshape(rows, length + 1)
    batch = mx.array(tokens.astype(np.int32))
    table = []
    for training in ("LoRA", "full"):
        ready, floor, values = {}, {}, {}
        for name, loss in LOSSES.items():
            model = load(path)[0]
            model.set_dtype(mx.float32)
            optimizer = lora(model) if training == "LoRA" else optim.AdamW(1e-5)
            model.train()
            mt.checkpoint_blocks(model)
            ready[name] = step_of(model, loss, optimizer), (model.state, optimizer.state)
            values[name] = run(ready[name], batch)[0]
            with mt.memory_limit(1):
                floor[name] = min(run(ready[name], batch)[1] for _ in range(2))
        peaks, times = in_turns(ready, batch, turns, "plain")
        for name in LOSSES:
            figures = [mt.format_bytes(floor[name]), mt.format_bytes(peaks[name]), times[name]]
            table.append((training, name, *figures, f"{values[name] / values['plain'] - 1:+.1e}"))
            print(*table[-1], flush=True)
    columns = ("training", "loss", "held back", "free", "time over plain", "first loss over plain")
    print(render_table(columns, table, title=f"{path.rstrip('/').split('/')[-1]}, float32, {rows} x {length} tokens"))


def trainer_steps(model: nn.Module, rows: int, length: int, vocabulary: int, turns: int) -> None:
    """mlx-lm's step with either loss, in turns: predicted floor, peak under a limit of one byte, peak without, time."""
    optimizer = lora(model)
    mx.eval(model.parameters())
    data = [([(7919 * i + row) % vocabulary for i in range(length)], 0) for row in range(rows)]
    args = TrainingArgs(batch_size=rows, max_seq_length=length, grad_checkpoint=True)
    ways, table = {"mlx-lm's": True, "linear": False}, []
    floors = {
        name: lm.estimate_memory(model, data, args, optimizer=optimizer, plain_loss=plain)
        for name, plain in ways.items()
    }
    ready, least = {}, {}
    with ExitStack() as around:
        around.enter_context(mt.checkpoint_blocks(model))
        for name, plain in ways.items():
            made = around.enter_context(lm.training_step(model, optimizer, data, args, plain_loss=plain))
            batch = made.make_batch(rows)
            ready[name] = (lambda batch, step=made.step: step(batch)[0]), made.state
            run(ready[name], batch)
            with mt.memory_limit(1):
                least[name] = min(run(ready[name], batch)[1] for _ in range(2))
        peaks, times = in_turns(ready, batch, turns, "mlx-lm's")
    for name in ways:
        own = floors[name].floor_bytes - floors[name].start_bytes
        table.append((name, *map(mt.format_bytes, (own, least[name], peaks[name])), times[name]))
    columns = ("loss", "floor, predicted", "held back", "free", "time over mlx-lm's")
    title = f"LoRA, vocabulary {vocabulary:,}, {rows} x {length} tokens, every block checkpointed"
    print(render_table(columns, table, title=title))


def dwq_steps(rows: int, length: int, vocabulary: int, turns: int) -> None:
    """The gradient of "dwq" on one step's tokens, with the logits of both models and with their states."""
    reference = language_model("llama", vocab_size=vocabulary)
    model = copy.deepcopy(reference)
    nn.quantize(model, 64, 3)
    mx.eval(reference.parameters(), model.parameters())
    walked = WalkedModel(model)
    tokens = mx.random.randint(0, vocabulary, (rows, length + 1), key=mx.random.key(0))
    batch = read_batches([tokens], "calibration")[0]
    # A function cannot be split, so that its logits are what is learned from.
    ways: dict[str, Any] = {"logits": lambda tokens: reference(tokens), "states": reference}
    ready, predicted, least, table = {}, {}, {}, []
    with ExitStack() as around:
        around.enter_context(walked.evaluation_mode())
        layers = around.enter_context(trained_in_place(trainable_sites(walked), mx.float32))
        around.enter_context(walked.float32_arithmetic())
        start = [{name: layer[name] for name in NAMES} for layer in layers]
        for name, given in ways.items():
            answers = _answers(model, split_head), _answers(given, split_head)
            distance = Distance(*answers, around.enter_context(OutputStore()), made_dense)
            targets = distance.targets(batch)

            def loss(parameters: Any, distance: Distance = distance, targets: Any = targets) -> mx.array:
                for layer, own in zip(layers, parameters, strict=True):
                    for key, value in own.items():
                        dict.__setitem__(layer, key, value)
                return distance.of(batch, targets)

            gradient = mx.value_and_grad(loss)

            def step(given: Any, gradient: Any = gradient) -> mx.array:
                value, gradients = gradient(given)
                return mx.depends([value], [array for _, array in tree_flatten(gradients)])[0]

            found = mt.estimate_memory(step, start, state=(model, reference))
            ready[name], predicted[name] = (step, ()), found.floor_bytes - found.start_bytes
            run(ready[name], start)
            with mt.memory_limit(1):
                least[name] = min(run(ready[name], start)[1] for _ in range(2))
        peaks, times = in_turns(ready, start, turns, "logits")
    for name in ways:
        table.append((name, *map(mt.format_bytes, (predicted[name], least[name], peaks[name])), times[name]))
    columns = ("from", "floor, predicted", "held back", "free", "time over that from logits")
    print(render_table(columns, table, title=f"dwq, 3 bits, vocabulary {vocabulary:,}, {rows} x {length} tokens"))


def in_turns(ready: dict[str, Any], batch: Any, turns: int, first: str) -> tuple[dict[str, int], dict[str, str]]:
    """The highest peak of each step, and its time over that of the first: median, least and greatest of all turns.

    Each begins with an empty cache and is timed at its second step, as in training, which keeps what it allocated.
    """

    def settled(step: Any) -> tuple[float, int, float]:
        mx.clear_cache()
        run(step, batch)
        return run(step, batch)

    taken = [{name: settled(step) for name, step in ready.items()} for _ in range(turns)]
    peaks = {name: max(turn[name][1] for turn in taken) for name in ready}
    ratios = {name: [turn[name][2] / turn[first][2] for turn in taken] for name in ready}
    return peaks, {name: f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for name, r in ratios.items()}


def run(ready: Any, batch: mx.array) -> tuple[float, int, float]:
    """One step: its loss, what it held above what was there before, and its seconds."""
    step, state = ready
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    value = step(batch)
    mx.eval(value, state)
    mx.synchronize()
    return value.item(), mx.get_peak_memory() - before, time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder of a model that mlx-lm loads, with tied embeddings and calibration_tokens.npy"
    )
    parser.add_argument("--backend", choices=["cpu", "cuda", "metal"], help="for the floors; this machine's by default")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few blocks and tokens: to see that it runs")
    parser.add_argument("--trainer", action="store_true", help="mlx-lm's own step with and without its logits")
    parser.add_argument("--large", action="store_true", help="with --trainer, the 0.6 B shape at 4 x 2,048 tokens")
    parser.add_argument("--dwq", action="store_true", help='the gradient of a step of "dwq" likewise')
    options = parser.parse_args()
    if options.dwq:
        dwq_steps(*((2, 32, 2000, 1) if options.quick else (8, 128, 50_000, options.turns)))
        return
    if options.trainer:
        if options.large:
            trainer_steps(qwen_shape(28), 4, 2048, 151_936, options.turns)
            return
        vocabulary = 2000 if options.quick else 50_000
        model = language_model("llama", vocab_size=vocabulary)
        trainer_steps(model, *((2, 64, vocabulary, 1) if options.quick else (4, 256, vocabulary, options.turns)))
        return
    floors(*((2, 1, 256) if options.quick else (28, 4, 2048)), options.backend)
    if options.model:
        steps(options.model, *((1, 64, 1) if options.quick else (options.rows, options.length, options.turns)))


if __name__ == "__main__":
    main()
