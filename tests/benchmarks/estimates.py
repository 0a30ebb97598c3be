"""How close `estimate_memory` comes to the measured floor of a training step.

Each workload runs in a clean process: the estimate first, then five real steps under a memory limit of one byte, whose
smallest peak is the truth. On CPU `eval` can only wait at every tenth task that it dispatches, and runs ahead in
between, so five steps need not reach the floor. Where the system allows it, another step is run with the device keeping
up with dispatch (see keeping_up.py): its peak is the floor, whatever else the machine does. Three more steps run
without a limit, against the most that the estimate expects of them.

    python tests/benchmarks/estimates.py [--quick] [--only NAME ...] [--runs N] [--json FILE]
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


def measure(name: str, runs: int = RUNS) -> dict[str, Any]:
    """Estimate and measure one workload in this process."""
    import mlx.core as mx
    from keeping_up import CAN_KEEP_UP, free_peak, keep_up, throttled_peak
    from mlx.utils import tree_map
    from workloads import WORKLOADS, evaluate

    from mlx_tune.graphs import estimate_memory

    workload = WORKLOADS[name]()
    batch = tree_map(mx.array, workload.make_batch(workload.batch_size))
    mx.eval(batch)
    estimate = estimate_memory(workload.step, batch, state=workload.state)
    peaks = [throttled_peak(lambda: evaluate(workload, batch)) for _ in range(runs)]
    free = [free_peak(lambda: evaluate(workload, batch)) for _ in range(3)]
    kept_up = None
    if CAN_KEEP_UP:
        keep_up()
        kept_up = throttled_peak(lambda: evaluate(workload, batch))
    return {
        "name": name,
        "floor_bytes": estimate.floor_bytes,
        "peaks_bytes": peaks,
        "measured_bytes": min(peaks),
        "ratio": estimate.floor_bytes / min(peaks),
        "most_bytes": estimate.peak_bytes,
        "free_bytes": max(free),
        "kept_up_bytes": kept_up,
        "kept_up_ratio": kept_up and estimate.floor_bytes / kept_up,
        "operations": len(estimate.operations),
        "trace_seconds": estimate.trace_seconds,
        "unknown_operations": estimate.unknown_operations,
        "stand_ins": estimate.stand_ins,
    }


def summary(truth: str, ratios: list[float]) -> str:
    """How far estimates are from one kind of truth, on a line."""
    errors = [abs(ratio - 1) for ratio in ratios]
    return (
        f"Against the {truth}, {len(ratios)} steps: median error {statistics.median(errors):.2%}, worst "
        f"{max(errors):.2%}, furthest below the truth {min(ratios) - 1:+.2%}."
    )


def main() -> None:
    """Measure every workload in a child process of its own and print the table."""
    from workloads import WORKLOADS

    from mlx_tune.presentation.tables import render_table
    from mlx_tune.units import format_bytes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four workloads only")
    parser.add_argument("--only", nargs="+", choices=list(WORKLOADS), help="these workloads only")
    parser.add_argument("--runs", type=int, default=RUNS, help="real steps of each workload (default: 5)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.runs)))
        return
    rows = []
    for name in options.only or (QUICK if options.quick else WORKLOADS):
        command = [sys.executable, __file__, "--child", name, "--runs", str(options.runs)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        print(f"{name}: {rows[-1]['ratio'] - 1:+.2%}", file=sys.stderr)
    tracing = statistics.median(row["trace_seconds"] for row in rows)
    notes = [summary(f"smallest of {options.runs} runs", [row["ratio"] for row in rows])]
    if all(row["kept_up_ratio"] for row in rows):
        notes.append(summary("device keeping up", [row["kept_up_ratio"] for row in rows]))
    print(
        render_table(
            ["step", "estimate", f"of {options.runs} runs", "error", "spread", "keeping up", "error", "stand-in"],
            [
                (
                    row["name"],
                    format_bytes(row["floor_bytes"]),
                    format_bytes(row["measured_bytes"]),
                    f"{row['ratio'] - 1:+.1%}",
                    f"{max(row['peaks_bytes']) / row['measured_bytes'] - 1:.1%}",
                    format_bytes(row["kept_up_bytes"]) if row["kept_up_bytes"] else "",
                    f"{row['kept_up_ratio'] - 1:+.2%}" if row["kept_up_ratio"] else "",
                    ", ".join(row["stand_ins"]),
                )
                for row in rows
            ],
            notes=[*notes, f"Tracing took {tracing * 1000:.0f} ms (median)."],
        )
    )
    print(
        render_table(
            ["step", "most without a limit", "highest of 3 runs", "error"],
            [
                (
                    row["name"],
                    format_bytes(row["most_bytes"]),
                    format_bytes(row["free_bytes"]),
                    f"{row['most_bytes'] / row['free_bytes'] - 1:+.1%}",
                )
                for row in rows
            ],
            notes=[
                summary("highest of 3 runs without a limit", [row["most_bytes"] / row["free_bytes"] for row in rows])
            ],
        )
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
