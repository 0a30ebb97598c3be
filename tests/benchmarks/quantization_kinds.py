"""Which kinds of layers gain from the search, and which lose: each kind quantized alone, all others as they are.

    python tests/benchmarks/quantization_kinds.py --model PATH [--text FILE] [--bits 3] [--group 32] [--json FILE]

For models whose blocks are named as those of Llama are. Judged as `quantization.py` judges.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from quantization_judging import WINDOW, Judge, load, load_tokenizer, ratio, windows, worse
from quantization_methods import ours

from mlx_tune.presentation.tables import render_table
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.models.stored_outputs import OutputStore


def kinds(blocks: int) -> dict[str, tuple[str, ...]]:
    """Patterns of paths by kind."""
    few = max(1, blocks // 6)
    return {
        "q and k": ("*.q_proj", "*.k_proj"),
        "v and o": ("*.v_proj", "*.o_proj"),
        "gate and up": ("*.gate_proj", "*.up_proj"),
        "down": ("*.down_proj",),
        f"first {few} blocks": tuple(f"*.layers.{i}.*" for i in range(few)),
        f"last {few} blocks": tuple(f"*.layers.{i}.*" for i in range(blocks - few, blocks)),
        "embedding": ("*embed_tokens",),
        "all": ("*",),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model that mlx-lm loads")
    parser.add_argument("--text", type=Path, help="what to judge on (default: heldout_tokens.npy of that folder)")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--heldout-tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    text = options.text or Path(options.model) / "heldout_tokens.npy"
    held = windows(text, load_tokenizer(options.model), options.heldout_tokens // WINDOW, WINDOW)
    model = load(options.model)
    layers = [path for site in WalkedModel(model).sites if hasattr(site.module, "to_quantized") for path in site.paths]
    rows: list[dict[str, Any]] = []
    with OutputStore() as store:
        judge = Judge(options.model, mx.array(held), store)
        for kind, patterns in kinds(len(model.layers)).items():
            skip = tuple(path for path in layers if not any(fnmatch(path, p) for p in patterns))
            found: dict[str, tuple[dict[str, float], np.ndarray, np.ndarray]] = {}
            for method in ("nearest", "optimal"):
                mx.random.seed(0)
                found[method] = judge.measure(ours(method, options.bits, options.group, [], skip)(load(options.model)))
            (nearest, kl, loss), (optimal, new_kl, new_loss) = found["nearest"], found["optimal"]
            row = {"kind": kind, "nearest": nearest, "optimal": optimal}
            row["ratio"], row["worse"] = ratio(new_kl, kl), worse(new_loss, loss)
            rows.append(row)
            print(kind, nearest["mean_kl"], optimal["mean_kl"], row["ratio"], row["worse"], flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    cells = [
        (
            row["kind"],
            *(f"{row[m]['mean_kl']:.4f} / {row[m]['perplexity']:.2f}" for m in ("nearest", "optimal")),
            "{:.3f} ± {:.3f}".format(*row["ratio"]),
            "{:+.4f} ± {:.4f}".format(*row["worse"]),
        )
        for row in rows
    ]
    title = f"{options.bits} bits, groups of {options.group}; unquantized perplexity {judge.perplexity:.3f}"
    columns = ("quantized", "nearest: KL / perplexity", "optimal: KL / perplexity", "ratio", "nats worse")
    print(render_table(columns, cells, title=title))


if __name__ == "__main__":
    main()
