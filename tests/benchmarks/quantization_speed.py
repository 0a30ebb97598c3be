"""Seconds that calibrated quantization takes, beside mlx-lm's own, on the same model, tokens and machine, in one run.

    python tests/benchmarks/quantization_speed.py --model PATH [--calibration FILE] [--calibration-tokens 16384]
                                                  [--methods gptq mixed] [--float32] [--bits 4] [--target 4.5]

"gptq" against mlx-lm's gptq as its command runs it, in the model's own dtype; with --float32, its forward passes in
float32 as well, which is faster where a CPU has no products in half precision. "mixed" meets a size in bytes by
"optimal", against mlx-lm's choice between two widths, and then another size on a fresh copy of the model. Processor
seconds are fair on a machine that others use too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from quantization_judging import load, load_tokenizer, windows
from quantization_methods import GROUP, by_mlx_lm, mixed, ours


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model that mlx-lm loads")
    parser.add_argument("--calibration", type=Path, help="what to learn from (default: its calibration_tokens.npy)")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["gptq", "mixed"], choices=["gptq", "mixed"])
    parser.add_argument("--float32", action="store_true", help="mlx-lm's gptq in float32, too")
    parser.add_argument("--bits", type=int, default=4, choices=[2, 4, 8])
    parser.add_argument("--target", type=float, default=4.5, help="bits per weight of the mixed formats")
    options = parser.parse_args()
    learn = options.calibration or Path(options.model) / "calibration_tokens.npy"
    length = options.calibration_length
    tokens = windows(learn, load_tokenizer(options.model), options.calibration_tokens // length, length + 1)
    calibration = [mx.array(tokens[i : i + 4]) for i in range(0, len(tokens), 4)]

    def their_gptq(model: nn.Module) -> nn.Module:
        return by_mlx_lm("gptq", model, options.bits, tokens)

    if "gptq" in options.methods:
        own = timed(options.model, "mlx-lm gptq", their_gptq)
        if options.float32:
            timed(options.model, "mlx-lm gptq, float32", their_gptq, mx.float32)
        timed(options.model, "gptq", ours("gptq", options.bits, GROUP, calibration), beside=own)
    if "mixed" in options.methods:
        own = timed(
            options.model, "mlx-lm dynamic", lambda model: by_mlx_lm("dynamic", model, 0, tokens, options.target)
        )
        size = int(options.target * parameters_of(options.model) / 8)
        for bytes_wanted, name in ((size, "mixed"), (size * 9 // 10, "mixed, another size")):
            quantize = mixed("optimal", bytes_wanted, int(options.target), GROUP, calibration)
            timed(options.model, name, quantize, beside=own)


def parameters_of(path: str) -> int:
    """The number of a model's parameters."""
    return sum(array.size for _, array in tree_flatten(load(path).parameters()))


def timed(
    path: str,
    name: str,
    quantize: Callable[[nn.Module], nn.Module],
    dtype: mx.Dtype | None = None,
    *,
    beside: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """Quantize a fresh copy of the model; print and give back seconds by the clock and of the processor."""
    model = load(path)
    if dtype is not None:
        model.set_dtype(dtype)
    mx.eval(model.parameters())
    clock, processor = time.perf_counter(), time.process_time()
    mx.eval(quantize(model).parameters())
    found = time.perf_counter() - clock, time.process_time() - processor
    shares = "" if beside is None else f"   {found[0] / beside[0]:.2f} and {found[1] / beside[1]:.2f} of mlx-lm's"
    print(f"{name:<24} {found[0]:8.1f} s   {found[1]:8.1f} s of the processor{shares}", flush=True)
    mx.clear_cache()
    return found


if __name__ == "__main__":
    mx.random.seed(0)
    main()
