"""A planned choice of checkpointed blocks against every uniform one, under the same budget.

    python tests/benchmarks/plans.py [--quick] [--predict] [--json FILE] [name ...]

For each model and each of three budgets between the floor with every block checkpointed and the free peak with
none: the plan, and `every=1, 2, 3, ...` and none. Each uniform choice gets what the plan gets: a search for the
highest memory limit that keeps its peak within the budget. Those that stay within it are then timed in turns with
the plan, so that a busy machine slows all of them alike. The ratio is the plan's time over the best uniform one's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from workload_models import language_model
from workloads import Workload, build, class_loss, labelled, token_loss, tokens

from mlx_tune import BudgetError, estimate_memory, format_bytes, plan_checkpoints
from mlx_tune.checkpointing import find_blocks
from mlx_tune.checkpointing.planning.choose import relaxed
from mlx_tune.checkpointing.planning.survey import Survey
from mlx_tune.checkpointing.planning.ways import apply_choice
from mlx_tune.measuring.forecast import cheapest_fitting
from mlx_tune.measuring.step import StepTrial, run_step
from mlx_tune.measuring.throttle import best_trial, limit_trials
from mlx_tune.presentation.tables import render_table
from mlx_tune.progress import Bar
from mlx_tune.state import Snapshot


class Stage(nn.Module):
    """A residual block of the pyramid below."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(nn.gelu(self.up(self.norm(x))))


class Pyramid(nn.Module):
    """Blocks that all differ: hidden widths from 64 to 1024, some cheap for what they save, some not."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = [Stage(width, hidden) for hidden in (64, 1024, 128, 512, 64, 256, 1024, 128)]
        self.head = nn.Linear(width, 10)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _text(family: str, layers: int, length: int = 129, **options: Any) -> Workload:
    sizes = {"num_hidden_layers": layers}
    return build(family, lambda: language_model(family, **sizes), token_loss, partial(tokens, length=length), **options)


MODELS = {
    "llama, 8 blocks, AdamW, compiled": lambda: _text("llama", 8, batch_size=8, optimizer="adamw", compiled=True),
    "llama, 8 blocks, LoRA": lambda: _text("llama", 8, batch_size=8, tuning="lora", optimizer="adamw"),
    "gemma3, 6 blocks, two kinds": lambda: _text("gemma3_text", 6, batch_size=6, optimizer="adamw"),
    "falcon_h1 hybrid, 4 blocks": lambda: _text("falcon_h1", 4, batch_size=4),
    "pyramid of 8 unlike blocks": lambda: build(
        "pyramid", Pyramid, class_loss, partial(labelled, (128,)), batch_size=2048, optimizer="adamw"
    ),
}
QUICK = ("llama, 8 blocks, AdamW, compiled", "pyramid of 8 unlike blocks")


@dataclass(frozen=True)
class Way:
    """One choice of blocks with the limit it runs under."""

    name: str
    paths: tuple[str, ...]
    limit_bytes: int
    peak_bytes: int


def uniform_choices(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """None, and every kth block for every k that gives another choice."""
    stacks = find_blocks(model)
    choices: dict[str, tuple[str, ...]] = {"none": ()}
    for every in range(1, max(map(len, stacks)) + 1):
        paths = tuple(path for stack in stacks for path, _ in stack[::every])
        if paths not in choices.values():
            choices[f"every={every}"] = paths
    return choices


def floor_of(workload: Workload, batch: Any, paths: tuple[str, ...]) -> int:
    """The estimated floor under a choice."""
    undo = apply_choice(workload.model, paths)
    try:
        return estimate_memory(workload.step, batch, state=workload.state).floor_bytes
    finally:
        undo()


def run_once(workload: Workload, batch: Any, way: tuple[str, ...], limit: int | None) -> StepTrial:
    """One step under a choice that is applied already."""
    return run_step(workload.step, (batch,), workload.state, limit)


def fitted(workload: Workload, batch: Any, name: str, paths: tuple[str, ...], budget: int) -> Way | None:
    """A choice under the best limit for the budget; None where its peak cannot be kept within it."""
    floor = floor_of(workload, batch, paths)
    if floor > budget:
        return None
    undo = apply_choice(workload.model, paths)
    try:
        run_once(workload, batch, paths, min(floor, budget))

        def run(limit: int) -> StepTrial:
            trials = [run_once(workload, batch, paths, limit) for _ in range(2)]
            return StepTrial(limit, max(t.peak_bytes for t in trials), min(t.seconds for t in trials))

        best = best_trial(limit_trials(run, floor, budget), budget)
    finally:
        undo()
    return best and Way(name, paths, best.limit_bytes or 0, best.peak_bytes)


def in_turns(workload: Workload, batch: Any, ways: list[Way], turns: int) -> dict[str, list[float]]:
    """Seconds of a step of each way, turn by turn."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for turn in range(turns):
        for way in ways if turn % 2 == 0 else reversed(ways):
            undo = apply_choice(workload.model, way.paths)
            try:
                if turn == 0:
                    run_once(workload, batch, way.paths, way.limit_bytes)  # traces and compiles
                seconds[way.name].append(run_once(workload, batch, way.paths, way.limit_bytes).seconds)
            finally:
                undo()
    return seconds


def compare(name: str, shares: tuple[float, ...], turns: int) -> list[dict[str, Any]]:
    """All budgets of one model."""
    workload = MODELS[name]()
    batch = workload.make_batch(workload.batch_size)
    mx.eval(batch)
    choices = uniform_choices(workload.model)
    found = []
    with Snapshot(workload.state, spill=True):
        run_once(workload, batch, (), None)
        free = run_once(workload, batch, (), None).peak_bytes
        lowest = floor_of(workload, batch, choices["every=1"])
        for share in shares:
            budget = int(1.05 * lowest + share * (free - 1.05 * lowest))
            try:
                plan = plan_checkpoints(
                    workload.model,
                    workload.step,
                    workload.make_batch,
                    batch_size=workload.batch_size,
                    budget=budget,
                    state=workload.optimizer,
                    progress=False,
                )
            except BudgetError as error:
                found.append({"model": name, "budget_bytes": budget, "error": str(error)})
                continue
            planned = Way("plan", plan.paths, plan.limit_bytes, plan.peak_bytes)
            uniform = [way for key, paths in choices.items() if (way := fitted(workload, batch, key, paths, budget))]
            seconds = in_turns(workload, batch, [planned, *uniform], turns)
            found.append(compared(name, budget, plan, planned, uniform, seconds))
            print(line(found[-1]), flush=True)
    return found


def compared(
    name: str, budget: int, plan: Any, planned: Way, uniform: list[Way], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """The figures of one budget."""
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    best = min(uniform, key=lambda way: medians[way.name], default=None)
    ratios = [a / b for a, b in zip(seconds["plan"], seconds[best.name], strict=True)] if best else [float("nan")]
    noise = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    return {
        "model": name,
        "budget_bytes": budget,
        "plan_blocks": len(plan.paths),
        "blocks": len(plan.blocks),
        "plan_peak_bytes": planned.peak_bytes,
        "predicted_seconds": plan.predicted_seconds,
        "plan_seconds": medians["plan"],
        "uniform_seconds": {way.name: medians[way.name] for way in uniform},
        "best_uniform": best.name if best else None,
        "same_as": next((way.name for way in uniform if set(way.paths) == set(planned.paths)), None),
        "ratio": statistics.median(ratios),
        "noise": noise,
    }


def line(row: dict[str, Any]) -> str:
    """One budget on a line."""
    others = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in row["uniform_seconds"].items())
    return (
        f"{row['model']}, {format_bytes(row['budget_bytes'])}: {row['plan_blocks']} of {row['blocks']} blocks, "
        f"{row['plan_seconds']:.3f} s, peak {format_bytes(row['plan_peak_bytes'])}; uniform: {others or 'none fits'}; "
        f"ratio {row['ratio']:.3f} ± {row['noise']:.3f}" + (f", the plan is {row['same_as']}" if row["same_as"] else "")
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All budgets of all models."""
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([row["model"], format_bytes(row["budget_bytes"]), "does not fit", "", "", "", ""])
            continue
        best = row["best_uniform"]
        cells.append(
            [
                row["model"],
                format_bytes(row["budget_bytes"]),
                f"{row['plan_blocks']} of {row['blocks']}, {format_bytes(row['plan_peak_bytes'])}",
                f"{row['plan_seconds']:.3f} s",
                f"{row['uniform_seconds'][best]:.3f} s ({best})" if best else "none fits",
                ", ".join(row["uniform_seconds"]),
                f"{row['ratio']:.3f} ± {row['noise']:.3f}" if best else "",
            ]
        )
    headings = ["model", "budget", "planned blocks, peak", "step", "best uniform", "uniform that fit", "ratio"]
    return render_table(headings, cells)


def predicted(name: str, shares: tuple[float, ...]) -> list[list[str]]:
    """What the schedule and the best uniform choice that fits compute twice, by estimates: no noise."""
    workload = MODELS[name]()
    rows = []
    with Snapshot(workload.state, spill=True):
        survey = Survey(
            workload.model,
            workload.step,
            workload.make_batch,
            workload.batch_size,
            workload.state,
            None,
            Bar(),
        )
        survey.study()
        uniform = {
            key: tuple(path in paths for path in survey.paths) for key, paths in uniform_choices(workload.model).items()
        }
        plain, leanest = survey.floor(survey.none), survey.floor(survey.all)
        for share in shares:
            budget = int(leanest + share * (plain - leanest))
            index = cheapest_fitting(survey.choices, survey.floor, budget)
            chosen = survey.choices[-1] if index is None else survey.choices[index]
            chosen = relaxed(chosen, survey.kinds, survey.extra_seconds, survey.floor, budget)
            fitting = {key: c for key, c in uniform.items() if survey.floor(c) <= budget}
            best = min(fitting, key=lambda key: survey.extra(fitting[key]), default=None)
            ours, theirs = survey.extra(chosen), survey.extra(fitting[best]) if best else float("nan")
            rows.append(
                [
                    name,
                    format_bytes(budget),
                    f"{sum(chosen)} of {len(chosen)}",
                    format_bytes(survey.floor(chosen)),
                    f"{sum(fitting[best])} ({best})" if best else "none fits",
                    format_bytes(survey.floor(fitting[best])) if best else "",
                    f"{ours / theirs:.2f}" if best and theirs else "",
                ]
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models, by the beginning of their names")
    parser.add_argument("--quick", action="store_true", help="two models, one budget, few turns")
    parser.add_argument("--predict", action="store_true", help="compare by what is computed twice; times no steps")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    names = [n for n in MODELS if any(n.startswith(a) for a in args.names)] if args.names else list(MODELS)
    if args.quick and not args.names:
        names = list(QUICK)
    if args.predict:
        headings = ["model", "budget", "planned", "its floor", "best uniform", "its floor", "seconds twice, ratio"]
        print(render_table(headings, [row for name in names for row in predicted(name, (0.15, 0.4, 0.65, 0.9))]))
        return
    shares, turns = ((0.5,), 3) if args.quick else ((0.15, 0.5, 0.85), 7)
    rows = [row for name in names for row in compare(name, shares, turns)]
    print(table(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
