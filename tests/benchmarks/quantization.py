"""What quantization costs a language model, by method, at the same bytes; and mlx-lm's own methods beside it.

    python tests/benchmarks/quantization.py --model PATH [--text FILE] [--calibration FILE] [--bits 8 6 4 3 2]
                                            [--group 64] [--bpw 5 4.5 4 3.5] [--quick]
                                            [--methods nearest optimal gptq dwq mixed] [--mlx-lm [METHOD ...]]
                                            [--json FILE] [--keep FOLDER] [--skip LAYER ...] [--gguf [MIX ...]]

PATH is any folder that mlx-lm loads. FILE is a text, or an array of tokens (`.npy`); by default the model's folder
holds `heldout_tokens.npy` and `calibration_tokens.npy`. Every figure is from text that no method saw: windows spread
evenly over it, the reference and all quantized models in float32, weights reconstructed in float32 from codes and
scales as stored, the tied embedding included. The ratio is the mean KL divergence over that of rounding to nearest at
the same bits, "nats worse" the mean loss on the text above that of rounding to nearest, both with the standard error
over windows. Hours on a CPU: with --json, rows that FILE holds already are not measured again, and with --keep, "dwq"
starts from what "gptq" left in FOLDER, so that a run can go on. With --mlx-lm, the last column has processor seconds
(on a GPU, seconds by the clock) over those of its method of the same name, "optimal" over its rounding to nearest:
processor seconds are fair on a machine that others use too. With --gguf, llama.cpp's mixes of a dense Llama (packages
`gguf` and `libggml-python`), without and with an importance matrix. Beside each, in no more bytes: the largest single
format by "optimal" and "gptq", and "mixed optimal" and "mixed gptq" ("mixed": both), gptq in the formats that the other
chose if that was measured. "Q3_K alone" for MIX puts one type everywhere but in layers of --skip.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from quantization_gguf import MIXES, by_ggml, energies_of
from quantization_judging import WINDOW, Judge, Row, check_nearest, load, load_tokenizer, ratio, table, windows, worse
from quantization_methods import THEIRS, dwq_after_gptq, mixed, ours, theirs

import mlx_tune as mt
from mlx_tune.quantization.models.stored_outputs import OutputStore


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model that mlx-lm loads")
    parser.add_argument("--text", type=Path, help="what to judge on (default: heldout_tokens.npy of that folder)")
    parser.add_argument("--calibration", type=Path, help="what to learn from (default: its calibration_tokens.npy)")
    parser.add_argument("--group", type=int, default=64, choices=[32, 64, 128])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4, 3, 2])
    parser.add_argument("--bpw", type=float, nargs="*", default=[5, 4.5, 4, 3.5], help="targets of mixed precision")
    parser.add_argument("--methods", nargs="+", default=["nearest", "optimal", "gptq", "dwq", "mixed"])
    parser.add_argument("--skip", nargs="+", default=[], help="layers that stay as they are (not in mlx-lm's methods)")
    parser.add_argument("--mlx-lm", nargs="*", choices=THEIRS, metavar="METHOD", help=f"its own: {', '.join(THEIRS)}")
    parser.add_argument("--heldout-tokens", type=int, default=49152)
    parser.add_argument("--calibration-tokens", type=int, default=131072)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="a few tokens, 4 and 2 bits: to see that it runs")
    parser.add_argument("--gguf", nargs="*", metavar="MIX", help=f"llama.cpp's mixes: {', '.join(MIXES)}, or all")
    parser.add_argument("--json", type=Path, help="write the figures here, and go on from those that are there")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what gptq made here, for dwq to start from")
    options = parser.parse_args()
    if options.quick:
        options.bits, options.heldout_tokens, options.calibration_tokens = [4, 2], 2048, 4096
        options.calibration_length = WINDOW
    folder, tokenizer = Path(options.model), load_tokenizer(options.model)
    text, learn = (
        options.text or folder / "heldout_tokens.npy",
        options.calibration or folder / "calibration_tokens.npy",
    )
    held = windows(text, tokenizer, options.heldout_tokens // WINDOW, WINDOW)
    length = options.calibration_length
    learns = (
        options.bpw
        or options.gguf is not None
        or options.mlx_lm is not None
        or set(options.methods) - {"nearest", "optimal"}
    )
    data = (
        windows(learn, tokenizer, options.calibration_tokens // length, length + 1)
        if learns
        else np.zeros((0, 2), dtype=np.int32)
    )
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
        if options.gguf is not None:
            run.gguf(options.gguf or list(MIXES))
    print(table(run.rows, held.size, data.size))


Spent = tuple[float, float]  # seconds by the clock, and of the processor


class Run:
    """All that was asked for, one model after another."""

    def __init__(
        self, options: argparse.Namespace, judge: Judge, data: np.ndarray, calibration: list[mx.array], rows: list[Row]
    ) -> None:
        self.options, self.judge, self.data, self.calibration, self.rows = options, judge, data, calibration, rows
        self.parameters = sum(a.size for a in judge.own.values())

    def uniform(self, bits: int) -> None:
        """Every method at the same bits everywhere."""
        skip = tuple(self.options.skip)
        asked, after_gptq = self.asked(bits), self.kept(bits)
        for method in self.options.methods:
            if method == "dwq" and after_gptq is not None:  # it starts from there, so that need not be done again
                model, spent = after_gptq
                more = functools.partial(dwq_after_gptq, self.options.model, calibration=self.calibration)
                self.measure(method, asked, more, model, spent)
            elif not method.startswith("mixed"):
                done = self.measure(method, asked, ours(method, bits, self.options.group, self.calibration, skip))
                if method == "gptq" and done is not None:
                    after_gptq = done
                    self.keep(bits, *done)
        if self.options.mlx_lm is not None and bits < 8:
            for method in self.options.mlx_lm or THEIRS:
                if method != "gptq" or bits in (2, 4):
                    self.measure(f"mlx-lm {method}", asked, theirs(method, bits, self.data))

    def keep(self, bits: int, model: nn.Module, spent: Spent) -> None:
        """Write what gptq made, and how long it took."""
        if self.options.keep is not None:
            self.options.keep.mkdir(parents=True, exist_ok=True)
            arrays = dict(tree_flatten(model.parameters()))
            mx.save_safetensors(
                str(self.options.keep / f"gptq-{bits}-{self.options.group}.safetensors"),
                arrays,
                {"seconds": str(spent[0]), "processor": str(spent[1])},
            )

    def kept(self, bits: int) -> tuple[nn.Module, Spent] | None:
        """What an earlier run's gptq made."""
        if (
            self.options.keep is None
            or not (self.options.keep / f"gptq-{bits}-{self.options.group}.safetensors").exists()
        ):
            return None
        found: Any = mx.load(
            str(self.options.keep / f"gptq-{bits}-{self.options.group}.safetensors"), return_metadata=True
        )
        model = load(self.options.model)
        nn.quantize(model, self.options.group, bits)
        model.load_weights(list(found[0].items()))
        return model, (float(found[1]["seconds"]), float(found[1].get("processor", "nan")))

    def mixed(self, target: float) -> None:
        """Formats chosen layer by layer; beside mlx-lm's choice, in no more bytes than that took."""
        asked, size = f"{target:g} bpw", int(target * self.parameters / 8)
        if self.options.mlx_lm is not None:
            self.measure("mlx-lm dynamic", asked, theirs("dynamic", 0, self.data, target))
            size = min(size, next(r.size_bytes for r in self.rows if (r.method, r.asked) == ("mlx-lm dynamic", asked)))
        self.in_bytes(size, asked)

    def in_bytes(self, size: int, asked: str) -> None:
        """Formats chosen layer by layer in so many bytes, if those were asked for, and gptq in the formats chosen."""
        bits, skip = max(2, math.floor(8 * size / self.parameters - 0.5)), tuple(self.options.skip)
        for method in ("optimal", "gptq"):
            if {"mixed", f"mixed {method}"} & set(self.options.methods):
                known = [r.formats for r in self.rows if (r.method, r.asked) == ("mixed optimal", asked) and r.formats]
                formats = known[0] if known and method == "gptq" else None
                make = mixed(method, size, bits, self.options.group, self.calibration, skip, formats)
                self.measure(f"mixed {method}", asked, make)

    def gguf(self, mixes: list[str]) -> None:
        """llama.cpp's mixes, and beside each of them ours in no more bytes."""
        skip, energies = self.options.skip, functools.cache(self.energies)
        for mix in mixes:
            self.measure(mix, "GGUF", by_ggml(mix, dict, skip))
            self.measure(f"{mix} imatrix", "GGUF", by_ggml(mix, energies, skip))
            size = next(r.size_bytes for r in self.rows if (r.asked, r.method) == ("GGUF", f"{mix} imatrix"))
            _, bits, group = max(found for found in self.uniform_sizes if found[0] <= size)
            for method in ("optimal", "gptq"):
                if method in self.options.methods:
                    make = ours(method, bits, group, self.calibration, tuple(skip))
                    self.measure(method, self.asked(bits), make, group=group)
            self.in_bytes(size, f"as {mix}")

    @functools.cached_property
    def uniform_sizes(self) -> list[tuple[int, int, int]]:
        """Bytes, bits and group size of every single format."""
        model = load(self.options.model)
        every = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
        skip = self.options.skip
        return [(mt.plan_quantization(model, *each, skip=skip).size_after_bytes, *each) for each in every]

    def asked(self, bits: int) -> str:
        """The name of one number of bits everywhere."""
        return f"{bits} bits" + "".join(f" -{name}" for name in self.options.skip)

    def energies(self) -> dict[str, mx.array]:
        """The importance matrix of the calibration."""
        model = load(self.options.model)
        model.set_dtype(mx.float32)
        return energies_of(model, self.calibration)

    def measure(
        self,
        method: str,
        asked: str,
        quantize: Callable[[nn.Module], nn.Module],
        model: nn.Module | None = None,
        spent: Spent = (0.0, 0.0),
        group: int | None = None,
    ) -> tuple[nn.Module, Spent] | None:
        """One row, unless it is there; the quantized model and the seconds that it took."""
        group = group or self.options.group
        if any((row.method, row.asked, row.group) == (method, asked, group) for row in self.rows):
            return None
        mx.random.seed(0)
        model = load(self.options.model) if model is None else model
        clock, processor = time.perf_counter(), time.process_time()
        model = quantize(model)
        mx.eval(model.parameters())
        share = getattr(model, "share_of_time", 1.0)
        spent = (
            spent[0] + share * (time.perf_counter() - clock),
            spent[1] + share * (time.process_time() - processor),
        )
        size = getattr(model, "stored_bytes", None) or sum(a.nbytes for _, a in tree_flatten(model.parameters()))
        if method == "nearest":
            check_nearest(model, load(self.options.model))
        figures, by_window, losses = self.judge.measure(model)
        row = Row(
            method,
            asked,
            8 * size / self.parameters,
            size,
            seconds=spent[0],
            processor=spent[1] if mx.default_device() == mx.Device(mx.cpu) else math.nan,
            group=group,
            windows=by_window.tolist(),
            losses=losses.tolist(),
            formats=getattr(model, "formats", {}),
            **figures,
        )
        # A mixed model is compared with the uniform one of the same size, or llama.cpp's, if there is one.
        base = [r for r in self.rows if r.method == f"{asked[3:]} imatrix" and asked[:3] == "as "]
        base += [r for r in [*self.rows, row] if r.method == "nearest" and abs(r.size_bytes - size) < 0.01 * size]
        if base:
            row.ratio, row.ratio_error = ratio(by_window, np.array(base[0].windows))
            row.worse, row.worse_error = worse(losses, np.array(base[0].losses))
        self.rows.append(row)
        print(
            f"{row.asked:>8} {row.method:<14} {row.bits_per_weight:.3f} bpw  KL {row.mean_kl:.5f} "
            f"({row.ratio:.3f} ± {row.ratio_error:.3f})  perplexity {row.perplexity:.4f} "
            f"({row.worse:+.4f} ± {row.worse_error:.4f} nats)  {row.seconds:.1f} s",
            flush=True,
        )
        if self.options.json:
            whole = self.options.json.with_suffix(".part")
            whole.write_text(json.dumps([asdict(r) for r in self.rows], indent=1))
            whole.replace(self.options.json)  # one that is killed here leaves the rows before this one
        mx.clear_cache()
        return model, spent


if __name__ == "__main__":
    main()
