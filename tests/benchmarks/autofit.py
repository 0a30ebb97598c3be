"""autofit against the three things people do without it, within the same budget.

    python tests/benchmarks/autofit.py [--quick] [--json FILE] [name ...]

For each model and budget: autofit; the largest batch without checkpointing and the largest with every block
checkpointed, both as `autobatch` finds them, with the limit that it found; and mlx-lm's default, batch size 4 without
checkpointing or limit, where its peak is within the budget. All are then run in turns, and their rates compared turn
by turn. The ratio is autofit's rate over that of the best of the others, with its standard error. Where autofit chose
what the best of the others is, the ratio shows nothing but noise. All models take about twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from plans import Pyramid, _text
from workloads import Workload, build, class_loss, labelled

from mlx_tune import BudgetError, autobatch, autofit, checkpoint_blocks, estimate_memory, format_bytes
from mlx_tune.checkpointing import find_blocks
from mlx_tune.checkpointing.planning.ways import apply_choice
from mlx_tune.measuring.step import run_step
from mlx_tune.memory import memory_limit
from mlx_tune.presentation.tables import render_table
from mlx_tune.state import Snapshot
from mlx_tune.units import format_seconds

MODELS = {
    "llama, 6 blocks, AdamW": lambda: _text("llama", 6, length=65, optimizer="adamw"),
    "llama, 6 blocks, LoRA": lambda: _text("llama", 6, length=65, tuning="lora", optimizer="adamw"),
    "qwen3, 4 blocks, long rows": lambda: _text("qwen3", 4, length=257, optimizer="adamw"),
    "falcon_h1 hybrid, 3 blocks": lambda: _text("falcon_h1", 3, length=65),
    "pyramid of 8 unlike blocks": lambda: build(
        "pyramid", Pyramid, class_loss, lambda n: labelled((128,), 64 * n), optimizer="adamw"
    ),
}
#: Budgets are what these batches need without checkpointing, and a tenth.
SIZES = (2, 6, 16)
MLX_LM_BATCH = 4


@dataclass(frozen=True)
class Way:
    """A way to train: its batch, its blocks, its limit."""

    name: str
    batch_size: int
    paths: tuple[str, ...]
    limit_bytes: int | None


@contextmanager
def applied(workload: Workload, way: Way) -> Iterator[None]:
    """Train that way."""
    with ExitStack() as stack:
        stack.callback(apply_choice(workload.model, way.paths))
        if way.limit_bytes is not None:
            stack.enter_context(memory_limit(way.limit_bytes))
        yield


def one_step(workload: Workload, batches: dict[int, Any], way: Way) -> tuple[float, int]:
    """Rows a second, and the peak."""
    if way.batch_size not in batches:
        batches[way.batch_size] = workload.make_batch(way.batch_size)
        mx.eval(batches[way.batch_size])
    with applied(workload, way):
        trial = run_step(workload.step, (batches[way.batch_size],), workload.state)
    return way.batch_size / trial.seconds, trial.peak_bytes


def baselines(workload: Workload, budget: int) -> list[Way]:
    """What people do without autofit."""
    everything = tuple(path for stack in find_blocks(workload.model) for path, _ in stack)
    options: dict[str, Any] = {"budget": budget, "state": workload.state, "progress": False}
    ways = [Way("mlx-lm's default", MLX_LM_BATCH, (), None)]
    try:
        found = autobatch(workload.step, workload.make_batch, **options)
        ways.append(Way("plain, largest batch", found.batch_size, (), found.limit_bytes))
    except BudgetError:
        pass
    with checkpoint_blocks(workload.model):
        found = autobatch(workload.step, workload.make_batch, **options)
    ways.append(Way("all checkpointed, largest batch", found.batch_size, everything, found.limit_bytes))
    return ways


def compare(name: str, size: int, turns: int) -> dict[str, Any]:
    """One model under one budget."""
    workload = MODELS[name]()
    budget = int(1.1 * estimate_memory(workload.step, workload.make_batch(size), state=workload.state).floor_bytes)
    started = time.perf_counter()
    fit = autofit(
        workload.model,
        workload.step,
        workload.make_batch,
        budget=budget,
        state=workload.optimizer,
        progress=False,
    )
    search_seconds = time.perf_counter() - started
    ways = [Way("autofit", fit.batch_size, fit.paths, fit.limit_bytes), *baselines(workload, budget)]
    batches: dict[int, Any] = {}
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    peaks: dict[str, int] = {way.name: 0 for way in ways}
    with Snapshot(workload.state, spill=True):
        for turn in range(turns + 1):
            for way in ways if turn % 2 else reversed(ways):
                rate, peak = one_step(workload, batches, way)
                peaks[way.name] = max(peaks[way.name], peak)
                if turn:  # the first warms up
                    rates[way.name].append(rate)
    within = [way for way in ways[1:] if peaks[way.name] <= budget]
    medians = {key: statistics.median(values) for key, values in rates.items()}
    best = max(within, key=lambda way: medians[way.name])
    ratios = [a / b for a, b in zip(rates["autofit"], rates[best.name], strict=True)]
    row = {
        "model": name,
        "budget_bytes": budget,
        "ways": {w.name: [w.batch_size, len(w.paths), peaks[w.name], medians[w.name]] for w in ways},
        "best": best.name,
        "ratio": statistics.median(ratios),
        # 1.253 is how much wider the median of a normal sample scatters than its mean.
        "noise": 1.253 * statistics.stdev(ratios) / len(ratios) ** 0.5,
        "search_seconds": search_seconds,
        "predicted_rate": fit.predicted_rate,
        "measured_rate": fit.measured_rate,
    }
    print(f"{name}, {format_bytes(budget)}: {row['ratio']:.3f} ± {row['noise']:.3f} of {best.name}", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """All models and budgets; rates in rows a second."""
    names = ["autofit", "plain, largest batch", "all checkpointed, largest batch", "mlx-lm's default"]
    cells = []
    for row in rows:
        line = [row["model"], format_bytes(row["budget_bytes"])]
        for name in names:
            if name not in row["ways"]:
                line.append("does not fit")
                continue
            batch, blocks, peak, rate = row["ways"][name]
            over = "" if peak <= row["budget_bytes"] else ", over the budget"
            line.append(f"{rate:.1f} ({batch}, {blocks} blocks, {format_bytes(peak)}{over})")
        cells.append([*line, f"{row['ratio']:.3f} ± {row['noise']:.3f}", format_seconds(row["search_seconds"])])
    return render_table(["model", "budget", *names, "ratio", "search"], cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models, by the beginning of their names")
    parser.add_argument("--quick", action="store_true", help="one model, one budget, few turns")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    names = [n for n in MODELS if any(n.startswith(a) for a in args.names)] if args.names else list(MODELS)
    if args.quick and not args.names:
        names = names[:1]
    rows = [
        compare(name, size, 3 if args.quick else 9) for name in names for size in (SIZES[1:2] if args.quick else SIZES)
    ]
    print(table(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
