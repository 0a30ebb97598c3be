"""How close `estimate_memory` comes to the measured floor of a training step.

Each workload runs in a clean process: the estimate first, then five real steps under a memory limit of one byte.
The truth is the smallest of the five peaks, since memory is sometimes released a moment late.

    python tests/benchmarks/estimates.py [--quick] [--only NAME ...] [--runs N] [--shift] [--json FILE]

On CPU `eval` can only wait at every tenth task that it dispatches, so a step that dispatches a multiple of ten tasks
waits at the same places in every run. `--shift` dispatches a few tasks before each run so that the places differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

QUICK = ("llama-f32-sgd", "llama-f32-sgd-checkpointed", "cnn-f32-adamw-compiled", "mlp-f32-adamw")
RUNS = 5


def measure(name: str, runs: int = RUNS, shift: bool = False) -> dict[str, Any]:
    """Estimate and measure one workload in this process."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from workloads import WORKLOADS, evaluate

    from mlx_tune.graphs import estimate_memory

    workload = WORKLOADS[name]()
    batch = tree_map(mx.array, workload.make_batch(workload.batch_size))
    mx.eval(batch)
    estimate = estimate_memory(workload.step, batch, state=workload.state)
    peaks = []
    for run in range(runs):
        for _ in range(run % 4 if shift else 0):
            mx.eval(mx.zeros((1,))[None].reshape(-1))
        mx.clear_cache()
        previous = mx.set_memory_limit(1)
        mx.reset_peak_memory()
        try:
            evaluate(workload, batch)
            mx.synchronize()
        finally:
            mx.set_memory_limit(previous)
        peaks.append(mx.get_peak_memory())
    return {
        "name": name,
        "floor_bytes": estimate.floor_bytes,
        "peaks_bytes": peaks,
        "measured_bytes": min(peaks),
        "ratio": estimate.floor_bytes / min(peaks),
        "operations": len(estimate.operations),
        "trace_seconds": estimate.trace_seconds,
        "unknown_operations": estimate.unknown_operations,
        "stand_ins": estimate.stand_ins,
    }


def main() -> None:
    """Measure every workload in a child process of its own and print the table."""
    from workloads import WORKLOADS

    from mlx_tune.tables import render_table
    from mlx_tune.units import format_bytes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four workloads only")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), help="these workloads only")
    parser.add_argument("--runs", type=int, default=RUNS, help="real steps of each workload (default: 5)")
    parser.add_argument("--shift", action="store_true", help="let the runs wait at different places")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.runs, options.shift)))
        return
    rows = []
    for name in options.only or (QUICK if options.quick else WORKLOADS):
        command = [sys.executable, __file__, "--child", name, "--runs", str(options.runs)]
        command += ["--shift"] if options.shift else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(f"{name}: {rows[-1]['ratio'] - 1:+.2%}", file=sys.stderr)
    errors = [abs(row["ratio"] - 1) for row in rows]
    print(
        render_table(
            ["step", "estimate", "measured", "error", "spread", "operations", "stand-ins"],
            [
                (
                    row["name"],
                    format_bytes(row["floor_bytes"]),
                    format_bytes(row["measured_bytes"]),
                    f"{row['ratio'] - 1:+.1%}",
                    f"{max(row['peaks_bytes']) / row['measured_bytes'] - 1:.1%}",
                    row["operations"],
                    ", ".join(row["stand_ins"]),
                )
                for row in rows
            ],
            notes=[
                f"{len(rows)} steps: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}, "
                f"furthest below the truth {min(row['ratio'] - 1 for row in rows):+.1%}, "
                f"tracing {statistics.median(row['trace_seconds'] for row in rows) * 1000:.0f} ms (median)."
            ],
        )
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
