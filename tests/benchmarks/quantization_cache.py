"""The cost of a quantized key/value cache on a real model, keys and values together and apart.

    python tests/benchmarks/quantization_cache.py --model PATH --text FILE [--bits 8 4 2] [--group 64] [--length 256]
                                                  [--tokens 2048] [--budget 16GB]

FILE is text, or tokens (`.npy`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
from quantization_judging import load_tokenizer, windows

from mlx_tune import lm


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--budget", default="16GB")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    rows = mx.array(windows(options.text, tokenizer, options.tokens // options.length, options.length))
    print(
        lm.cache_report(
            lm.load(options.model)[0],
            [rows[i : i + 1] for i in range(len(rows))],
            kv_bits=options.bits,
            group_size=options.group,
            budget=options.budget,
            progress=False,
        )
    )


if __name__ == "__main__":
    main()
