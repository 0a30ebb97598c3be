"""The largest batch to generate with, its peak and its rate at each size.

    python tests/benchmarks/generation.py --model PATH [--prompt-tokens 64] [--max-tokens 192] [--json FILE]

At the end mlx-lm's own `batch_generate` is run from prompt to last token with the answer, and its peak stands beside
the one that was measured without generating everything.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
import mlx_lm

from mlx_tune import lm, track_memory
from mlx_tune.units import format_bytes, format_percent


def main() -> None:
    """Search, then generate in full with the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--memory-budget", default="400MB")
    parser.add_argument("--max-batch", type=int)
    parser.add_argument("--float32", action="store_true", help="generate with float32 weights")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    model, tokenizer, *_ = lm.load(options.model)
    if options.float32:
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    lengths = {"prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens}
    shared = {**lengths, "budget": options.memory_budget, "max_batch": options.max_batch, "progress": False}
    results = {"plain cache": lm.autobatch_generate(model, **shared)}
    results["4-bit cache"] = lm.autobatch_generate(model, **shared, kv_bits=4, kv_group_size=64)
    for result in results.values():
        print(f"{result}\nknee: {result.knee}; searched in {result.search_seconds:.1f} s\n")
    plain = results["plain cache"]
    tokenizer.eos_token_ids.clear()  # every row goes to its last token
    prompts = [[(7 * i + j) % 1000 for j in range(options.prompt_tokens)] for i in range(plain.batch_size)]
    with track_memory() as memory:
        mlx_lm.batch_generate(
            model, tokenizer, prompts, max_tokens=options.max_tokens, completion_batch_size=plain.batch_size
        )
    foretold = next(trial.peak_bytes for trial in plain.trials if trial.batch_size == plain.batch_size)
    print(
        f"batch_generate with {plain.batch_size} rows, in full: peak {format_bytes(memory.peak_bytes)}, "
        f"{format_percent(memory.peak_bytes / foretold - 1)} off the trial's {format_bytes(foretold)}"
    )
    if options.json:
        figures = {name: result.to_dict() for name, result in results.items()}
        Path(options.json).write_text(json.dumps({**figures, "full_peak_bytes": memory.peak_bytes}, indent=2))


if __name__ == "__main__":
    main()
