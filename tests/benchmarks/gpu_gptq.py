"""Seconds of "gptq" beside mlx-lm's own gptq, on a Llama of random weights in the shape of a 1 B model, on a GPU.

    python tests/benchmarks/gpu_gptq.py [--blocks 2 16] [--tokens 131072] [--length 2048] [--methods mlx-lm ours]

Both learn from the same random tokens, at 4 bits in groups of 64, the model in bfloat16; the figures are seconds by the
clock. The first run of each method compiles its kernels, so give a small number of blocks before the one that counts.
Each line is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import time

import gpu_models
import mlx.core as mx
from gpu_measuring import release
from mlx_lm.quant.gptq import gptq_quantize

import mlx_tune as mt

ROWS = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1B", choices=sorted(gpu_models.SIZES))
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 16])
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--methods", nargs="+", default=["mlx-lm", "ours"], choices=["mlx-lm", "ours"])
    options = parser.parse_args()
    shape = gpu_models.SIZES[options.size]
    for blocks in options.blocks:
        gpu_models.SIZES["cut"] = (shape[0], blocks, *shape[2:])
        for method in options.methods:
            model = gpu_models.build("cut")
            rows = options.tokens // options.length
            tokens = mx.random.randint(0, shape[5], (rows, options.length), key=mx.random.key(0))
            mx.eval(model.parameters(), tokens)
            mx.synchronize()
            started = time.perf_counter()
            with mt.track_memory() as memory:
                if method == "ours":
                    batches = [tokens[i : i + ROWS] for i in range(0, rows, ROWS)]
                    mt.quantize_model(model, 4, 64, method="gptq", calibration=batches, progress=False)
                else:
                    model, _ = gptq_quantize(model, tokens, 4, 64, 4, 64, batch_size=ROWS)
                mx.eval(model.parameters())
                mx.synchronize()
            seconds = time.perf_counter() - started
            print(
                f"{options.size} shape, {blocks} blocks, {options.tokens} tokens, {method}: {seconds:.1f} s, "
                f"peak {memory.peak_bytes / 1e9:.1f} GB",
                flush=True,
            )
            del model
            release()


if __name__ == "__main__":
    main()
