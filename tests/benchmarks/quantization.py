"""What quantization costs a language model, by method, at the same bytes; and mlx-lm's own methods beside it.

    python tests/benchmarks/quantization.py --model PATH [--bits 8 6 4 3 2] [--bpw 5 4.5 4 3.5] [--quick]
                                            [--methods nearest optimal gptq dwq mixed] [--mlx-lm] [--json FILE]
                                            [--keep FOLDER]

PATH holds a model that mlx-lm loads, and two arrays of tokens: `calibration_tokens.npy` and `heldout_tokens.npy`.
Every figure is from text that no method saw: windows spread evenly over the held-out tokens, the reference and all
quantized models in float32, weights reconstructed in float32 from codes and scales as stored, the tied embedding
included. The ratio is the mean KL divergence over that of rounding to nearest at the same bits, with the standard error
over windows. Hours on a CPU: with --json, rows that FILE holds already are not measured again, and with --keep, "dwq"
starts from what "gptq" left in FOLDER, so that a run can go on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.quantization.batches import read_batches
from mlx_tune.quantization.dense import dequantized_weight
from mlx_tune.quantization.dwq import train_dwq
from mlx_tune.quantization.outputs import OutputStore
from mlx_tune.quantization.packing import dequantize_float32
from mlx_tune.quantization.sites import is_quantized, walk
from mlx_tune.tables import render_table

WINDOW = 256
GROUP = 64
THEIRS = ("mlx-lm gptq", "mlx-lm awq", "mlx-lm dwq")


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
    ratio_error: float = math.nan
    windows: list[float] = field(default_factory=list)


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

    def measure(self, quantized: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        """Compare a model with the reference, through float32 copies of what its weights stand for.

        Also gives the mean divergence of every window.
        """
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
        figures = {
            "mean_kl": float(every.mean()),
            "standard_error": float(by_window.std(ddof=1) / math.sqrt(len(by_window))),
            "p99_kl": float(np.quantile(every, 0.99)),
            "perplexity": math.exp(np.concatenate(nll).mean()),
            "same_top": float(np.concatenate(top).mean()),
        }
        return figures, by_window


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


def ratio(kl: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """The ratio of two means over the same windows, and its standard error."""
    found = kl.mean() / base.mean()
    left = kl - found * base  # windows that are hard for one are hard for the other: only what is left over is noise
    return float(found), float(left.std(ddof=1) / math.sqrt(len(left)) / base.mean())


def ours(method: str, bits: int, calibration: list[mx.array]) -> Callable[[nn.Module], nn.Module]:
    """One of this library's methods."""
    name, _, effort = method.partition(" ")

    def quantize(model: nn.Module) -> nn.Module:
        learn = calibration if name in ("gptq", "dwq") else None
        report = mt.quantize_model(
            model, bits, GROUP, method=name, effort=effort or "fast", calibration=learn, progress=False
        )
        _tell(report.notes)
        return model

    return quantize


def dwq_after_gptq(path: str, model: nn.Module, calibration: list[mx.array]) -> nn.Module:
    """What "dwq" does once it has done what "gptq" does."""
    _tell([train_dwq(model, load(path), read_batches(calibration, "calibration"), progress=False).summary])
    return model


def mixed(method: str, target_bytes: int, bits: int, calibration: list[mx.array]) -> Callable[[nn.Module], nn.Module]:
    """Bits chosen layer by layer."""

    def quantize(model: nn.Module) -> nn.Module:
        report = mt.quantize_model(
            model, bits, GROUP, method=method, target_bytes=target_bytes, calibration=calibration, progress=False
        )
        _tell(report.notes)
        return model

    return quantize


def _tell(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"    {note}", flush=True)


def theirs(method: str, bits: int, data: np.ndarray, target: float = 0.0) -> Callable[[nn.Module], nn.Module]:
    """One of mlx-lm's methods, on the same tokens."""

    def quantize(model: nn.Module) -> nn.Module:
        # On a CPU, half precision has no fast product. Scales end up in the model's own dtype either way.
        cpu = mx.default_device() == mx.Device(mx.cpu)
        if cpu:
            model.set_dtype(mx.float32)
        done = _theirs(method, model, bits, mx.array(data[:, :-1]), data, target)
        if cpu:
            done.set_dtype(mx.bfloat16)
        return done

    return quantize


def _theirs(method: str, model: nn.Module, bits: int, inputs: mx.array, data: np.ndarray, target: float) -> nn.Module:
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

    # Two levels around the target, as its command line has them: 4 and 5 bits for 5 bits per weight.
    low, high = math.ceil(target - 1.5), math.floor(target + 0.5)
    found = dict(estimate_sensitivities(model, inputs, low, GROUP, high, GROUP))
    threshold = estimate_threshold(model, found, target, low, GROUP, high, GROUP)

    def choose(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": high, "group_size": GROUP} if found[path] > threshold else True

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
    parser.add_argument("--bpw", type=float, nargs="*", default=[5, 4.5, 4, 3.5], help="targets of mixed precision")
    parser.add_argument("--methods", nargs="+", default=["nearest", "optimal", "gptq", "dwq", "mixed"])
    parser.add_argument("--mlx-lm", action="store_true", help="mlx-lm's own methods, too (slow on a CPU)")
    parser.add_argument("--heldout-tokens", type=int, default=49152)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a few tokens, 4 and 2 bits: to see that it runs")
    parser.add_argument("--json", type=Path, help="write the figures here, and go on from those that are there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what gptq made here, for dwq to start from")
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
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    with OutputStore() as store:
        judge = Judge(options.model, mx.array(held), store)
        print(f"unquantized: perplexity {judge.perplexity:.4f} on {held.size:,} tokens", flush=True)
        run = Run(options, judge, data, calibration, [Row(**row) for row in found])
        for bits in options.bits:
            run.uniform(bits)
        for target in options.bpw:
            run.mixed(target)
    print(table(run.rows, held.size, data.size))


class Run:
    """All that was asked for, one model after another."""

    def __init__(
        self, options: argparse.Namespace, judge: Judge, data: np.ndarray, calibration: list[mx.array], rows: list[Row]
    ) -> None:
        self.options, self.judge, self.data, self.calibration, self.rows = options, judge, data, calibration, rows
        self.parameters = sum(a.size for a in judge.own.values())

    def uniform(self, bits: int) -> None:
        """Every method at the same bits everywhere."""
        asked, after_gptq = f"{bits} bits", self.kept(bits)
        for method in self.options.methods:
            if method == "dwq" and after_gptq is not None:  # it starts from there, so that need not be done again
                model, seconds = after_gptq
                more = functools.partial(dwq_after_gptq, self.options.model, calibration=self.calibration)
                self.measure(method, asked, more, model, seconds)
            elif method != "mixed":
                done = self.measure(method, asked, ours(method, bits, self.calibration))
                if method == "gptq" and done is not None:
                    after_gptq = done
                    self.keep(bits, *done)
        if self.options.mlx_lm and bits < 8:
            for method in THEIRS:
                if method != "mlx-lm gptq" or bits in (2, 4):
                    self.measure(method, asked, theirs(method, bits, self.data))

    def keep(self, bits: int, model: nn.Module, seconds: float) -> None:
        """Write what gptq made, and how long it took."""
        if self.options.keep is not None:
            self.options.keep.mkdir(parents=True, exist_ok=True)
            arrays = dict(tree_flatten(model.parameters()))
            mx.save_safetensors(str(self.options.keep / f"gptq-{bits}.safetensors"), arrays, {"seconds": str(seconds)})

    def kept(self, bits: int) -> tuple[nn.Module, float] | None:
        """What an earlier run's gptq made."""
        if self.options.keep is None or not (self.options.keep / f"gptq-{bits}.safetensors").exists():
            return None
        found: Any = mx.load(str(self.options.keep / f"gptq-{bits}.safetensors"), return_metadata=True)
        model = load(self.options.model)
        nn.quantize(model, GROUP, bits)
        model.load_weights(list(found[0].items()))
        return model, float(found[1]["seconds"])

    def mixed(self, target: float) -> None:
        """Formats chosen layer by layer; beside mlx-lm's choice, in no more bytes than that took."""
        asked, size = f"{target:g} bpw", int(target * self.parameters / 8)
        if self.options.mlx_lm:
            self.measure("mlx-lm dynamic", asked, theirs("mlx-lm dynamic", 0, self.data, target))
            size = min(size, next(r.size_bytes for r in self.rows if (r.method, r.asked) == ("mlx-lm dynamic", asked)))
        if "mixed" in self.options.methods:
            for method in ("optimal", "gptq"):
                make = mixed(method, size, max(2, math.floor(target - 0.5)), self.calibration)
                self.measure(f"mixed {method}", asked, make)

    def measure(
        self,
        method: str,
        asked: str,
        quantize: Callable[[nn.Module], nn.Module],
        model: nn.Module | None = None,
        seconds: float = 0.0,
    ) -> tuple[nn.Module, float] | None:
        """One row, unless it is there; the quantized model and the seconds that it took."""
        if any((row.method, row.asked) == (method, asked) for row in self.rows):
            return None
        mx.random.seed(0)
        model = load(self.options.model) if model is None else model
        start = time.perf_counter()
        model = quantize(model)
        mx.eval(model.parameters())
        seconds += time.perf_counter() - start
        size = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
        if method == "nearest":
            check_nearest(model, load(self.options.model), int(asked.split()[0]))
        figures, by_window = self.judge.measure(model)
        row = Row(
            method, asked, 8 * size / self.parameters, size, seconds=seconds, windows=by_window.tolist(), **figures
        )
        # A mixed model is compared with the uniform one of the same size, if there is one.
        base = [r for r in [*self.rows, row] if r.method == "nearest" and abs(r.size_bytes - size) < 0.01 * size]
        if base:
            row.ratio, row.ratio_error = ratio(by_window, np.array(base[0].windows))
        self.rows.append(row)
        print(
            f"{row.asked:>8} {row.method:<14} {row.bits_per_weight:.3f} bpw  KL {row.mean_kl:.5f} "
            f"({row.ratio:.3f} ± {row.ratio_error:.3f})  perplexity {row.perplexity:.4f}  {row.seconds:.1f} s",
            flush=True,
        )
        if self.options.json:
            self.options.json.write_text(json.dumps([asdict(r) for r in self.rows], indent=1))
        mx.clear_cache()
        return model, seconds


def table(rows: list[Row], heldout: int, learned: int) -> str:
    """All figures."""
    lines = [
        (
            row.asked,
            row.method,
            f"{row.bits_per_weight:.3f}",
            mt.format_bytes(row.size_bytes),
            f"{row.mean_kl:.5f} ± {row.standard_error:.5f}",
            f"{row.ratio:.3f} ± {row.ratio_error:.3f}" if row.ratio == row.ratio else "",
            f"{row.p99_kl:.4f}",
            f"{row.perplexity:.4f}",
            f"{100 * row.same_top:.1f} %",
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    columns = ("asked", "method", "bits/weight", "size", "mean KL", "ratio", "p99 KL", "perplexity", "same top", "s")
    return render_table(
        columns,
        lines,
        title=f"Judged on {heldout:,} held-out tokens; calibrated methods learned from {learned:,}",
    )


if __name__ == "__main__":
    main()
