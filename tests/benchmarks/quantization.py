"""What quantization costs a language model, by method, at the same bytes; and mlx-lm's own methods beside it.

    python tests/benchmarks/quantization.py --model PATH [--bits 8 6 4 3 2] [--methods nearest optimal ...] [--quick]
                                            [--mlx-lm] [--json FILE]

PATH holds a model that mlx-lm loads, and two arrays of tokens: `calibration_tokens.npy` and `heldout_tokens.npy`.
Every figure is from text that no method saw: windows spread evenly over the held-out tokens, the reference and all
quantized models in float32, weights reconstructed in float32 from codes and scales as stored, the tied embedding
included. The ratio is the mean KL divergence over that of rounding to nearest at the same bits.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.quantization.dense import dequantized_weight
from mlx_tune.quantization.outputs import OutputStore
from mlx_tune.quantization.packing import dequantize_float32
from mlx_tune.quantization.sites import is_quantized, walk
from mlx_tune.tables import render_table

WINDOW = 256
GROUP = 64
OURS = ("nearest", "optimal", "optimal best", "gptq", "dwq")
THEIRS = ("mlx-lm gptq", "mlx-lm awq", "mlx-lm dwq", "mlx-lm dynamic")


@dataclass
class Row:
    """One model measured."""

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
    ratio: float = math.nan
    note: str = ""


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

    def measure(self, quantized: nn.Module) -> dict[str, float]:
        """Compare a model with the reference, through float32 copies of what its weights stand for."""
        weights = {k: v.astype(mx.float32) for k, v in tree_flatten(quantized.parameters()) if k in self.own}
        for site in walk(quantized):
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
        return {
            "mean_kl": float(every.mean()),
            "standard_error": float(by_window.std(ddof=1) / math.sqrt(len(by_window))),
            "p99_kl": float(np.quantile(every, 0.99)),
            "perplexity": math.exp(np.concatenate(nll).mean()),
            "same_top": float(np.concatenate(top).mean()),
        }


def load(path: str) -> nn.Module:
    """The model in its own dtype."""
    from mlx_lm import load as load_model

    model = load_model(path)[0]
    mx.eval(model.parameters())
    return model


def windows(path: str, name: str, count: int, length: int) -> np.ndarray:
    """Windows spread evenly over a token file."""
    tokens = np.load(Path(path) / f"{name}_tokens.npy").astype(np.int32)
    step = (len(tokens) - length) // max(1, count - 1)
    return np.stack([tokens[i * step : i * step + length] for i in range(count)])


def ours(method: str, bits: int, calibration: list[mx.array]) -> Callable[[nn.Module], nn.Module]:
    """One of this library's methods."""
    name, _, effort = method.partition(" ")

    def quantize(model: nn.Module) -> nn.Module:
        learn = calibration if name in ("gptq", "dwq") else None
        report = mt.quantize_model(
            model, bits, GROUP, method=name, effort=effort or "fast", calibration=learn, progress=False
        )
        for note in report.notes:
            print(f"    {note}", flush=True)
        return model

    return quantize


def mixed(bits_per_weight: float, calibration: list[mx.array]) -> Callable[[nn.Module], nn.Module]:
    """Bits chosen layer by layer."""

    def quantize(model: nn.Module) -> nn.Module:
        bits = max(2, math.floor(bits_per_weight - 0.45))
        mt.quantize_model(
            model, bits, GROUP, method="optimal", target_bpw=bits_per_weight, calibration=calibration, progress=False
        )
        return model

    return quantize


def theirs(method: str, bits: int, data: np.ndarray, bits_per_weight: float) -> Callable[[nn.Module], nn.Module]:
    """One of mlx-lm's methods, on the same tokens."""

    def quantize(model: nn.Module) -> nn.Module:
        # On a CPU, half precision has no fast product. Scales end up in the model's own dtype either way.
        cpu = mx.default_device() == mx.Device(mx.cpu)
        if cpu:
            model.set_dtype(mx.float32)
        done = _theirs(method, model, bits, mx.array(data[:, :-1]), data, bits_per_weight)
        if cpu:
            done.set_dtype(mx.bfloat16)
        return done

    return quantize


def _theirs(
    method: str, model: nn.Module, bits: int, inputs: mx.array, data: np.ndarray, bits_per_weight: float
) -> nn.Module:
    if method == "mlx-lm gptq":
        from mlx_lm.quant.gptq import gptq_quantize

        return gptq_quantize(model, inputs, bits, GROUP, bits, GROUP)[0]
    if method == "mlx-lm awq":
        from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize

        few = inputs[: max(8, 16384 // inputs.shape[1])]
        awq_quantize(model, few, AWQ_MODEL_CONFIGS["llama"], GROUP, bits, GROUP, bits)
        return model
    if method == "mlx-lm dwq":
        from mlx.optimizers import Adam
        from mlx_lm.quant.dwq import dwq_quantize

        best: tuple[float, nn.Module] | None = None
        lines = [(list(map(int, line[: WINDOW + 1])), 0) for line in data]
        for rate in (1e-6, 1e-5, 1e-4):  # it has no way to choose, so it gets the best of three
            student = copy.deepcopy(model)
            nn.quantize(student, GROUP, bits)
            held = lines[::8]
            rest = [line for i, line in enumerate(lines) if i % 8]
            dwq_quantize(
                student, lambda batch, *_, **__: model(batch), Adam(rate, bias_correction=True), rest, held, 4,
                WINDOW + 1, 0,
            )  # fmt: skip
            inputs_held = mx.array(np.array([line for line, _ in held])[:, :-1])
            loss = _divergence(model(inputs_held), student(inputs_held))
            if best is None or loss < best[0]:
                best = loss, student
        assert best is not None
        return best[1]
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold

    low = bits
    found = dict(estimate_sensitivities(model, inputs, low, GROUP, low + 1, GROUP))
    threshold = estimate_threshold(model, found, bits_per_weight, low, GROUP, low + 1, GROUP)

    def choose(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": low + 1, "group_size": GROUP} if found[path] > threshold else True

    nn.quantize(model, GROUP, low, class_predicate=choose)
    return model


def _divergence(before: mx.array, after: mx.array) -> float:
    lx, ly = (z.astype(mx.float32) - mx.logsumexp(z.astype(mx.float32), -1, keepdims=True) for z in (before, after))
    return (mx.exp(lx) * (lx - ly)).sum(-1).mean().item()


def check_nearest(model: nn.Module, plain: nn.Module, bits: int) -> None:
    """That the baseline is what MLX stores, nothing weaker."""
    before = dict(tree_flatten(plain.parameters()))
    for site in walk(model):
        if is_quantized(site.module):
            stored = mx.quantize(before[f"{site.path}.weight"], GROUP, bits)
            same = dequantize_float32(*stored, bits, GROUP) == dequantized_weight(site.module)
            assert same.all().item(), site.path


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model and its token files")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4, 3, 2])
    parser.add_argument("--bpw", type=float, nargs="*", default=[4.5, 3.5], help="targets of mixed precision")
    parser.add_argument("--methods", nargs="+", default=["nearest", "optimal", "gptq", "dwq", "mixed"])
    parser.add_argument("--mlx-lm", action="store_true", help="mlx-lm's own methods, too (slow on a CPU)")
    parser.add_argument("--heldout-tokens", type=int, default=49152)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a few tokens, 4 and 2 bits: to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    if options.quick:
        options.bits, options.heldout_tokens, options.calibration_tokens = [4, 2], 2048, 4096
        options.calibration_length = WINDOW
    held = windows(options.model, "heldout", options.heldout_tokens // WINDOW, WINDOW)
    data = windows(
        options.model, "calibration", options.calibration_tokens // options.calibration_length,
        options.calibration_length + 1,
    )  # fmt: skip
    calibration = [mx.array(data[i : i + options.batch_size]) for i in range(0, len(data), options.batch_size)]
    rows: list[Row] = []
    with OutputStore() as store:
        judge = Judge(options.model, mx.array(held), store)
        print(f"unquantized: perplexity {judge.perplexity:.4f} on {held.size:,} tokens", flush=True)
        for method, asked, bits, quantize in _jobs(options, data, calibration):
            mx.random.seed(0)
            model = load(options.model)
            start = time.perf_counter()
            model = quantize(model)
            mx.eval(model.parameters())
            seconds = time.perf_counter() - start
            size = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
            count = sum(a.size for a in judge.own.values())
            if method == "nearest":
                check_nearest(model, load(options.model), bits)
            row = Row(method, asked, 8 * size / count, size, seconds=seconds, **judge.measure(model))
            base = next((r for r in rows if r.method == "nearest" and r.asked == asked), None)
            row.ratio = row.mean_kl / base.mean_kl if base else (1.0 if method == "nearest" else math.nan)
            rows.append(row)
            print(
                f"{row.asked:>8} {row.method:<14} {row.bits_per_weight:.3f} bpw  KL {row.mean_kl:.5f} "
                f"({row.ratio:.3f})  perplexity {row.perplexity:.4f}  {row.seconds:.1f} s",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
            del model
            mx.clear_cache()
    print(table(rows, held.size, data.size))


def _jobs(options: argparse.Namespace, data: np.ndarray, calibration: list[mx.array]) -> Any:
    for bits in options.bits:
        for method in options.methods:
            if method in ("gptq", "dwq", "nearest", "optimal") or method.startswith("optimal "):
                yield method, f"{bits} bits", bits, ours(method, bits, calibration)
        if options.mlx_lm:
            for method in THEIRS[:3]:
                if (method != "mlx-lm gptq" or bits in (2, 4, 8)) and bits < 8:
                    yield method, f"{bits} bits", bits, theirs(method, bits, data, bits + 0.5)
    for target in options.bpw:
        if "mixed" in options.methods:
            yield "mixed", f"{target} bpw", 0, mixed(target, calibration)
        if options.mlx_lm:
            low = math.floor(target - 0.5)
            yield "mlx-lm dynamic", f"{target} bpw", low, theirs("mlx-lm dynamic", low, data, target)


def table(rows: list[Row], heldout: int, learned: int) -> str:
    """All figures."""
    lines = [
        (
            row.asked, row.method, f"{row.bits_per_weight:.3f}", mt.format_bytes(row.size_bytes),
            f"{row.mean_kl:.5f} ± {row.standard_error:.5f}", f"{row.ratio:.3f}" if row.ratio == row.ratio else "",
            f"{row.p99_kl:.4f}", f"{row.perplexity:.4f}", f"{100 * row.same_top:.1f} %", f"{row.seconds:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    columns = ("asked", "method", "bits/weight", "size", "mean KL", "ratio", "p99 KL", "perplexity", "same top", "s")
    return render_table(
        columns,
        lines,
        title=f"Judged on {heldout:,} held-out tokens; calibrated methods learned from {learned:,}",
    )


if __name__ == "__main__":
    main()
