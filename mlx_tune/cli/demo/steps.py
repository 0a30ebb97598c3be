"""The demonstration, step by step: text, batch, checkpoints, training, wiring, quantization, a saved model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import mlx_tune as mt
from mlx_tune.cli.demo.corpus import Corpus, read_corpus
from mlx_tune.cli.output import folded
from mlx_tune.devices import machine
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.files.scratch import writing
from mlx_tune.lm import small_model
from mlx_tune.lm.loading import load
from mlx_tune.lm.saving import save_quantized
from mlx_tune.lm.tokens import token_batches
from mlx_tune.memory import resolve_budget
from mlx_tune.presentation.tabular import Table
from mlx_tune.progress import progress_bar
from mlx_tune.quantization.judging.accuracy import LanguageAccuracy
from mlx_tune.quantization.judging.report import QuantizationReport
from mlx_tune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

_VOCABULARY = 1024
_LENGTH = 129  # 128 predictions a row

#: More rows a step would only make the demonstration slower on two cores.
_MOST_ROWS = 8

_BITS = (8, 4, 3)


@dataclass
class _Run:
    """The values that the steps hand on, and the figures that end up in the JSON."""

    say: Callable[[object], None]
    out: Path
    figures: dict[str, object] = field(default_factory=dict)


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the whole path.

    Args:
        arguments: `text`, `budget`, `steps`, `out`, `seed`, `json`.

    Returns:
        The exit code: 0 where the held-out perplexity fell, 1 where it did not.
    """
    import mlx.core as mx

    out = Path(arguments.out)
    if arguments.steps < 1:
        raise InvalidArgumentError(f"--steps {arguments.steps}: at least one step is needed.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgumentError(f"--out {str(out)!r} is there already and not empty: name a new folder.")
    budget = resolve_budget(arguments.budget)
    mx.random.seed(arguments.seed)
    where = sys.stderr if arguments.json else sys.stdout
    run = _Run(say=lambda result: print(folded(result), file=where, flush=True), out=out)

    run.say(f"Machine   {machine()}")
    run.say(f"          may use {mt.memory_budget()}")
    corpus = read_corpus(arguments.text)
    with writing(out, "The demonstration's text", way_out="Name a folder on a larger disk with --out."):
        tokenizer, training, held_out = _tokens(run, corpus, arguments.seed)
    model, config = small_model.small_llama(_VOCABULARY)
    mx.eval(model.parameters())
    trained = _train(run, model, training, held_out, budget, arguments.steps)
    model.set_dtype(mx.bfloat16)  # as models are published: 16-bit weights are what quantization starts from
    mx.eval(model.parameters())
    _quantize(run, model, config, tokenizer, held_out)
    if arguments.json:
        print(json.dumps(run.figures, indent=2))
    return 0 if trained else 1


def _tokens(run: _Run, corpus: Corpus, seed: int) -> tuple[object, list[mx.array], list[mx.array]]:
    """A tokenizer of the text, rows to train on and held-out batches."""
    with progress_bar("training a tokenizer"):
        tokenizer = small_model.train_tokenizer(
            corpus.training[::4] or corpus.training, _VOCABULARY, run.out / "tokenizer"
        )
    folder = run.out / "text"
    rows, held_out = [], []
    for name, texts, batch_size, most in (("training", corpus.training, 1, 4000), ("held-out", corpus.held_out, 8, 4)):
        place = folder / name
        place.mkdir(parents=True)
        for number, text in enumerate(texts):
            (place / f"{number:05d}.txt").write_text(text, encoding="utf-8")
        batches = token_batches(tokenizer, place, batch_size=batch_size, length=_LENGTH, max_batches=most, seed=seed)
        if name == "training":
            rows = batches
        else:
            held_out = batches
    run.say(
        f"Text      {corpus.source}: {len(corpus.training)} documents, {len(rows)} rows of {_LENGTH - 1} tokens; "
        f"{len(corpus.held_out)} other documents held out"
    )
    run.figures["text"] = {"source": corpus.source, "rows": len(rows), "held_out_batches": len(held_out)}
    return tokenizer, rows, held_out


def _train(
    run: _Run,
    model: nn.Module,
    rows: list[mx.array],
    held_out: list[mx.array],
    budget: int,
    steps: int,
) -> bool:
    """Find the batch, plain and checkpointed, train with the larger; True where held-out perplexity fell."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    optimizer = optim.AdamW(learning_rate=3e-3)
    optimizer.init(model.trainable_parameters())
    loss_and_gradients = nn.value_and_grad(model, small_model.next_token_loss)

    # Not compiled: on a processor MLX calls a C++ compiler for every fused kernel, which takes longer than these steps.
    def step(tokens: mx.array) -> mx.array:
        loss: mx.array
        loss, gradients = loss_and_gradients(model, tokens)
        optimizer.update(model, gradients)
        return loss

    def make_batch(n: int) -> mx.array:
        return mx.concatenate([rows[i % len(rows)] for i in range(n)])

    find = partial(mt.autobatch, step, make_batch, budget=budget, max_batch=_MOST_ROWS, state=(model, optimizer))
    before = small_model.perplexity(model, held_out)
    plain = find()
    blocks = mt.checkpoint_blocks(model)
    saving = find()
    run.say(f"\nBatch     in {format_bytes(budget)}: {plain.batch_size} rows plain, {saving.batch_size} checkpointed")
    run.say(saving)
    best, n = (saving, saving.batch_size) if saving.batch_size > plain.batch_size else (plain, plain.batch_size)
    if best is plain:
        blocks.undo()
    run.say(f"\nTrain     {steps} steps of {n} rows, blocks {'plain' if best is plain else 'checkpointed'}")
    with best.applied(), mt.track_memory() as memory, progress_bar("training", total=steps) as bar:
        for i in range(steps):
            batch = mx.concatenate([rows[(i * n + j) % len(rows)] for j in range(n)])
            loss = step(batch)
            mx.eval(loss, model.state, optimizer.state)
            bar.update(completed=i + 1, text=f"loss {loss.item():.2f}")
    blocks.undo()
    after = small_model.perplexity(model, held_out)
    run.say(
        f"          held-out perplexity {before:.0f} -> {after:.0f}, peak {format_bytes(memory.peak_bytes)} of "
        f"{format_bytes(budget)}, {format_seconds(memory.seconds / steps)} a step"
    )
    run.figures["batch"] = {"plain": plain.to_dict(), "checkpointed": saving.to_dict()}
    run.figures["training"] = {
        "batch_size": n,
        "checkpointed": best is saving,
        "perplexity_before": before,
        "perplexity_after": after,
        **memory.to_dict(),
    }
    return after < before


def _quantize(
    run: _Run,
    model: nn.Module,
    config: Mapping[str, object],
    tokenizer: object,
    held_out: list[mx.array],
) -> None:
    """Quantize copies at several widths, save the 4-bit one, load it with stock mlx-lm, let it write."""
    reports, saved = {}, None
    with mt.wired_limit(model) as wired:
        run.say(f"\nWired     {format_bytes(wired.limit_bytes) if wired.applied else 'no: ' + wired.reason}")
        for bits in _BITS:
            copy, _ = small_model.small_llama(_VOCABULARY)
            copy.update(model.parameters())
            reports[bits] = mt.quantize_model(copy, bits, 64, evaluation=held_out)
            if bits == 4:
                saved = save_quantized(run.out / "model-4bit", copy, tokenizer, config)
    accuracies = {bits: _accuracy(report) for bits, report in reports.items()}
    whole = reports[_BITS[0]]
    table = [["16-bit", format_bytes(whole.size_before_bytes), "16.00", "0", f"{accuracies[8].perplexity_before:.2f}"]]
    for bits, report in reports.items():
        accuracy = accuracies[bits]
        table.append(
            [
                f"{bits}-bit",
                format_bytes(report.size_after_bytes),
                f"{report.bits_per_weight:.2f}",
                f"{accuracy.mean_kl:.5f}",
                f"{accuracy.perplexity_after:.2f}",
            ]
        )
    run.say("")
    run.say(Table(["weights", "size", "bits per weight", "KL (nats)", "perplexity"], table))
    assert saved is not None
    loaded, loaded_tokenizer, _, _ = load(saved)  # stock mlx_lm.load underneath
    check = _accuracy(mt.quantization_report(loaded, model, held_out))
    text = small_model.generate_text(loaded, loaded_tokenizer, "import os\n\n\ndef ", 48)
    run.say(
        f"\nSaved     {saved}; loaded by mlx_lm.load: perplexity {check.perplexity_after:.2f} "
        f"(report: {accuracies[4].perplexity_after:.2f}). It writes:\n"
    )
    run.say("\n".join("    " + line for line in ("import os\n\n\ndef " + text).splitlines()))
    run.figures["quantization"] = {f"{bits}-bit": report.to_dict() for bits, report in reports.items()}
    run.figures["saved"] = {"path": str(saved), "perplexity_after_loading": check.perplexity_after, "text": text}


def _accuracy(report: QuantizationReport) -> LanguageAccuracy:
    """The report's accuracy of a language model, as these are."""
    assert isinstance(report.accuracy, LanguageAccuracy)
    return report.accuracy
