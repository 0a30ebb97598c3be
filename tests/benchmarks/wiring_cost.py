"""What a `wired_limit` block costs, over a stand-in for Metal: it should be nothing beside a generated token.

python tests/benchmarks/wiring_cost.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
import pytest
from metal_stand_in import MetalStandIn
from mlx_lm.generate import wired_limit as mlx_lm_wired_limit

import mlx_tune as mt
from mlx_tune.presentation.tables import render_table


def seconds_per_block(make_block, model, repeats: int) -> float:
    """The median time of entering and leaving."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        with make_block(model):
            pass
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(count: int, repeats: int) -> dict[str, float]:
    """Blocks over a model of so many arrays, alone and while another block on the same model is live."""
    model = {f"layer{i}": mx.zeros((4,)) for i in range(count)}
    with mt.wired_limit(model):
        nested = seconds_per_block(mt.wired_limit, model, repeats)
    return {
        "arrays": count,
        "mlx_lm_seconds": seconds_per_block(mlx_lm_wired_limit, model, repeats),
        "alone_seconds": seconds_per_block(mt.wired_limit, model, repeats),
        "nested_seconds": nested,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    with pytest.MonkeyPatch.context() as patch:
        MetalStandIn().install(patch)
        counts = [10, 300] if args.quick else [10, 300, 1000, 3000]
        found = [measure(count, 5 if args.quick else 51) for count in counts]
    rows = [
        [row["arrays"], *(f"{1e6 * row[name]:.0f}" for name in ("mlx_lm_seconds", "alone_seconds", "nested_seconds"))]
        for row in found
    ]
    columns = ["arrays", "mlx-lm µs", "mlx_tune µs", "with another live µs"]
    print(render_table(columns, rows, title="Entering and leaving a wired block, median"))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
