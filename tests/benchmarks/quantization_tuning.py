"""How much the constants of gptq and dwq matter on a model: shrinkage of moments, and rates of training.

    python tests/benchmarks/quantization_tuning.py --model PATH [--text FILE] [--calibration FILE] [--bits 3]
                                                   [--shrinkage rule 0 0.1 0.3 0.5 0.7 0.9] [--rates 0.001 0.003 ...]
                                                   [--layers PATH ...] [--json FILE]

gptq once for every shrinkage ("rule" is the library's own), then dwq from the first of them, once for every rate alone
and once with the library's own choice. Judged as `quantization.py` judges, on text that no method saw.

With --layers, 128 rows of each of these layers instead, by gptq at every shrinkage: the error of their outputs on the
held-out text over that of "optimal" with the energies of the calibration.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from quantization_judging import WINDOW, Judge, load, load_tokenizer, ratio, windows, worse
from quantization_methods import ours

from mlx_tune.presentation.tables import render_table
from mlx_tune.quantization.formats.affine import quantize_affine
from mlx_tune.quantization.formats.packing import dequantize_float32
from mlx_tune.quantization.learning import gptq_model
from mlx_tune.quantization.learning.dwq import RATES, train_dwq
from mlx_tune.quantization.learning.gptq import output_error, quantize_gptq, shrinkage_for
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.models.stored_outputs import OutputStore


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model that mlx-lm loads")
    parser.add_argument("--text", type=Path, help="what to judge on (default: heldout_tokens.npy of that folder)")
    parser.add_argument("--calibration", type=Path, help="what to learn from (default: its calibration_tokens.npy)")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--shrinkage", nargs="+", default=["rule", "0", "0.1", "0.3", "0.5", "0.7", "0.9"])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.001, 0.003, 0.01, 0.03])
    parser.add_argument("--heldout-tokens", type=int, default=4096)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--calibration-length", type=int, default=256)
    parser.add_argument("--layers", nargs="+", default=[], metavar="PATH")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    folder, tokenizer, length = Path(options.model), load_tokenizer(options.model), options.calibration_length
    text = options.text or folder / "heldout_tokens.npy"
    learn = options.calibration or folder / "calibration_tokens.npy"
    held = windows(text, tokenizer, options.heldout_tokens // WINDOW, WINDOW)
    data = windows(learn, tokenizer, options.calibration_tokens // length, length + 1)
    if options.layers:
        print(by_layer(options, mx.array(data[:, :-1]), mx.array(held)))
        return
    calibration = [mx.array(data[i : i + 4]) for i in range(0, len(data), 4)]
    rows: list[dict[str, Any]] = []
    with OutputStore() as store:
        judge = Judge(options.model, mx.array(held), store)
        base: tuple[np.ndarray, np.ndarray] | None = None

        def note(what: str, model: Any, seconds: float, said: str = "") -> None:
            nonlocal base
            figures, by_window, losses = judge.measure(model)
            base = base or (by_window, losses)
            row = {"what": what, "bits": options.bits, "seconds": seconds, "said": said, **figures}
            row["ratio"], row["ratio_error"] = ratio(by_window, base[0])
            row["worse"], row["worse_error"] = worse(losses, base[1])
            rows.append(row)
            print(
                f"{what:<18} KL {row['mean_kl']:.5f} ({row['ratio']:.3f} ± {row['ratio_error']:.3f}) {said}", flush=True
            )
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))

        note("nearest", ours("nearest", options.bits, options.group, [])(load(options.model)), 0.0)
        start: Any = None
        for value in options.shrinkage:
            rule = shrinkage_for if value == "rule" else (lambda columns, tokens, share=float(value): share)
            mx.random.seed(0)
            began = time.perf_counter()
            with mock.patch.object(gptq_model, "shrinkage_for", rule):
                model = ours("gptq", options.bits, options.group, calibration)(load(options.model))
            mx.eval(model.parameters())
            note(f"shrinkage {value}", model, time.perf_counter() - began)
            start = start or model
        for rates in [*((rate,) for rate in options.rates), *([RATES] if options.rates else [])]:
            model = copy.deepcopy(start)
            began = time.perf_counter()
            done = train_dwq(
                WalkedModel(model),
                load(options.model),
                read_batches(calibration, "calibration"),
                rates=rates,
                progress=False,
            )
            note(f"rates {', '.join(map(str, rates))}", model, time.perf_counter() - began, done.summary)
    columns = ("what", "mean KL", "ratio", "perplexity", "nats worse", "s")
    cells = [
        (
            row["what"],
            f"{row['mean_kl']:.5f}",
            f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['worse']:+.4f} ± {row['worse_error']:.4f}",
            f"{row['seconds']:.1f}",
        )
        for row in rows
    ]
    title = f"{options.bits} bits, judged on {held.size:,} held-out tokens, learned from {data.size:,}"
    print(render_table(columns, cells, title=title))


class Tap(nn.Module):
    """A layer that adds up the second moments of its inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.sums = inner, mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        self.sums = self.sums + rows.T @ rows
        return self.inner(x)


def by_layer(options: argparse.Namespace, learn: mx.array, held: mx.array) -> str:
    """A table of output errors on held-out text over those of "optimal"."""
    model = load(options.model)
    model.set_dtype(mx.float32)
    taps = {path: Tap(dict(model.named_modules())[path]) for path in options.layers}
    model.update_modules(tree_unflatten(list(taps.items())))
    moments = []
    for tokens in (learn, held):
        for tap in taps.values():
            tap.sums = mx.array(0.0)
        for i in range(0, len(tokens), 4):
            model(tokens[i : i + 4])
            mx.eval([tap.sums for tap in taps.values()])
        moments.append({path: tap.sums for path, tap in taps.items()})
    lines = []
    for path, tap in taps.items():
        weight = tap.inner.weight[:128].astype(mx.bfloat16)
        hessian, judged = (sums[path] for sums in moments)
        energy = mx.diagonal(hessian)
        optimal = quantize_affine(weight, options.bits, options.group, importance=energy)
        base = output_error(weight, dequantize_float32(*optimal, options.bits, options.group), judged)
        cells = []
        for value in options.shrinkage:
            share = shrinkage_for(weight.shape[1], learn.size) if value == "rule" else float(value)
            packed = quantize_gptq(weight, hessian, options.bits, options.group, start=optimal, shrinkage=share)[:3]
            error = output_error(weight, dequantize_float32(*packed, options.bits, options.group), judged)
            cells.append(f"{error / base:.3f}" + (f" ({share:.2f})" if value == "rule" else ""))
        lines.append((path, str(weight.shape[1]), str(options.bits), *cells))
        print(*lines[-1], flush=True)
    return render_table(
        ("layer", "inputs", "bits", *options.shrinkage), lines, title=f"learned from {learn.size:,} tokens"
    )


if __name__ == "__main__":
    main()
