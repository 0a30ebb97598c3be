"""The judge of quantized language models: the unquantized one on held-out text, and models' divergences from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.presentation.tables import render_table
from mlx_tune.quantization.formats.packing import dequantize_float32
from mlx_tune.quantization.models.layers import dequantized_weight, is_quantized
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.models.stored_outputs import OutputStore

WINDOW = 256


@dataclass
class Row:
    """One model measured.

    `worse` is its mean loss on the text less that of rounding to nearest, in nats a token; `seconds` are by the clock.
    `formats` has the format of each layer where these were chosen.
    """

    method: str
    asked: str
    bits_per_weight: float
    size_bytes: int
    mean_kl: float
    standard_error: float
    p99_kl: float
    perplexity: float
    same_top: float
    seconds: float
    processor: float = math.nan
    ratio: float = math.nan
    ratio_error: float = math.nan
    worse: float = math.nan
    worse_error: float = math.nan
    group: int = 64
    windows: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    formats: dict[str, dict[str, Any]] = field(default_factory=dict)


class Judge:
    """The unquantized model's outputs on held-out text, and models' divergences from them."""

    def __init__(self, path: str, tokens: mx.array, store: OutputStore) -> None:
        self.model = load(path)
        self.model.set_dtype(mx.float32)
        self.own = dict(tree_flatten(self.model.parameters()))
        self.tokens, self.store = tokens, store
        self.perplexity = math.exp(np.mean([self._record(i) for i in range(0, tokens.shape[0], 4)]))

    def _logits(self, i: int) -> tuple[mx.array, mx.array]:
        x = self.tokens[i : i + 4]
        logits = self.model(x)
        return x, logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def _record(self, i: int) -> float:
        x, logits = self._logits(i)
        self.store.put([logits])
        return -mx.take_along_axis(logits[:, :-1], x[:, 1:, None], axis=-1).mean().item()

    def measure(self, quantized: nn.Module) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
        """Compare a model with the reference, through float32 copies of what its weights stand for.

        Also gives the mean divergence and the mean loss of every window.
        """
        weights = {k: v.astype(mx.float32) for k, v in tree_flatten(quantized.parameters()) if k in self.own}
        for site in WalkedModel(quantized).sites:
            if is_quantized(site.module):
                weights |= {f"{path}.weight": dequantized_weight(site.module) for path in site.paths}
        self.model.load_weights(list((self.own | weights).items()))
        kl, top, nll = [], [], []
        for k, i in enumerate(range(0, self.tokens.shape[0], 4)):
            before = self.store.get(k)[0]
            x, after = self._logits(i)
            divergence = (mx.exp(before) * (before - after)).sum(-1)
            same = before.argmax(-1) == after.argmax(-1)
            chosen = -mx.take_along_axis(after[:, :-1], x[:, 1:, None], axis=-1)[..., 0]
            mx.eval(divergence, same, chosen)
            kl.append(np.array(divergence, dtype=np.float64))
            top.append(np.array(same))
            nll.append(np.array(chosen, dtype=np.float64))
        self.model.load_weights(list(self.own.items()))
        every = np.concatenate(kl)
        by_window = every.mean(1)
        figures = {
            "mean_kl": float(every.mean()),
            "standard_error": float(by_window.std(ddof=1) / math.sqrt(len(by_window))),
            "p99_kl": float(np.quantile(every, 0.99)),
            "perplexity": math.exp(np.concatenate(nll).mean()),
            "same_top": float(np.concatenate(top).mean()),
        }
        return figures, by_window, np.concatenate(nll).mean(1)


def load(path: str) -> nn.Module:
    """The model in its own dtype."""
    from mlx_lm import load as load_model

    model = load_model(path)[0]
    mx.eval(model.parameters())
    return model


def load_tokenizer(path: str) -> Any:
    """Its tokenizer."""
    from mlx_lm import load as load_model

    return load_model(path, lazy=True)[1]


def windows(source: Path, tokenizer: Any, count: int, length: int) -> np.ndarray:
    """Windows spread evenly over a text, or over a file of tokens."""
    if source.suffix == ".npy":
        tokens = np.load(source).astype(np.int32)
    else:
        tokens = np.array(tokenizer.encode(source.read_text()), dtype=np.int32)
    if len(tokens) < length:
        raise SystemExit(f"{source} has {len(tokens)} tokens: {length} are needed.")
    count = min(count, len(tokens) // length)
    step = (len(tokens) - length) // max(1, count - 1)
    return np.stack([tokens[i * step : i * step + length] for i in range(count)])


def ratio(kl: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """The ratio of two means over the same windows, and its standard error."""
    found = kl.mean() / base.mean()
    left = kl - found * base  # windows that are hard for one are hard for the other: only what is left over is noise
    return float(found), float(left.std(ddof=1) / math.sqrt(len(left)) / base.mean())


def worse(losses: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """The mean loss above that of another model on the same windows, and its standard error."""
    by_window = losses - base
    return float(by_window.mean()), float(by_window.std(ddof=1) / math.sqrt(len(by_window)))


def check_nearest(model: nn.Module, plain: nn.Module) -> None:
    """That the baseline is what MLX stores, nothing weaker."""
    before = dict(tree_flatten(plain.parameters()))
    for site in WalkedModel(model).sites:
        if is_quantized(site.module):
            size, bits = site.module.group_size, site.module.bits
            stored = mx.quantize(before[f"{site.path}.weight"], size, bits)
            same = dequantize_float32(*stored, bits, size) == dequantized_weight(site.module)
            assert same.all().item(), site.path


def share_of_theirs(row: Row, rows: list[Row]) -> float:
    """The time that it took over that of mlx-lm's method for the same; not a number where that was not run."""
    name = "dynamic" if row.method.startswith("mixed") else row.method.partition(" ")[0]
    same = {r.method: r for r in rows if (r.asked, r.group) == (row.asked, row.group)}
    theirs = same.get("mlx-lm nearest" if name == "optimal" else f"mlx-lm {name}")
    if theirs is None or row.method.startswith("mlx-lm"):
        return math.nan
    processor = row.processor / theirs.processor
    return processor if processor == processor else row.seconds / theirs.seconds


def table(rows: list[Row], heldout: int, learned: int) -> str:
    """All figures."""
    lines = [
        (
            row.asked,
            str(row.group),
            row.method,
            f"{row.bits_per_weight:.3f}",
            mt.format_bytes(row.size_bytes),
            f"{row.mean_kl:.5f} ± {row.standard_error:.5f}",
            f"{row.ratio:.3f} ± {row.ratio_error:.3f}" if row.ratio == row.ratio else "",
            f"{row.p99_kl:.4f}",
            f"{row.perplexity:.4f}",
            f"{row.worse:+.4f} ± {row.worse_error:.4f}" if row.worse == row.worse else "",
            f"{100 * row.same_top:.1f} %",
            f"{row.seconds:.1f}",
            f"{row.processor:.1f}" if row.processor == row.processor else "",
            f"{share:.2f}" if (share := share_of_theirs(row, rows)) == share else "",
        )
        for row in rows
    ]
    columns = (
        "asked",
        "group",
        "method",
        "bits/weight",
        "size",
        "mean KL",
        "ratio",
        "p99 KL",
        "perplexity",
        "nats worse",
        "same top",
        "s",
        "processor s",
        "of mlx-lm's",
    )
    return render_table(
        columns,
        lines,
        title=f"Judged on {heldout:,} held-out tokens; calibrated methods learned from {learned:,}",
    )
