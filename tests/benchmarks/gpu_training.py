"""Sections of gpu.py about training: checkpoints and limits, plans, estimates, batches, and all of it together."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import gpu_models
import mlx.core as mx
from gpu_measuring import GB, TOKENS, measured, mlx_lm_checkpointing, note, release, training

import mlx_tune as mt
from mlx_tune.presentation.tables import render_table
from mlx_tune.units import format_bytes

LORA = {"lora": True}
QLORA = {"lora": True, "bits": 4}


def checkpointing(models: tuple[str, ...]) -> dict[str, Any]:
    """Peak and time of a step, each way of checkpointing: free, under limits, and under the tightest limit."""
    out: dict[str, Any] = {}
    cases: list[tuple[str, dict[str, Any], int, list[int | None]]] = [
        ("tiny", {}, 2, [None, GB // 50]),
        ("tiny", QLORA, 2, [None, GB // 50]),
        ("1B", {}, 8, [None, 12 * GB, 8 * GB]),
        ("8B", LORA, 4, [None, 24 * GB, 20 * GB]),
        ("8B", QLORA, 4, [None, 12 * GB, 8 * GB]),
    ]
    for size, options, rows, limits in cases:
        if size not in models:
            continue
        name = size + (" LoRA" if options.get("lora") else "") + (" on 4 bits" if options.get("bits") else "")
        table, figures = [], {}
        for way in ("ours", "mlx-lm", "plain", "ours, every 2nd"):
            job = training(size, **options)
            batch = job.make_batch(rows)
            every = 2 if way.endswith("2nd") else 1
            with (
                mlx_lm_checkpointing(job.model)
                if way == "mlx-lm"
                else mt.checkpoint_blocks(job.model, every=every)
                if way.startswith("ours")
                else nullcontext()
            ):
                figures[way] = [measured(job, batch, limit=limit) for limit in limits]
                tight = mt.tightest_limit(job.step, batch, state=job.state, slowdown=0.02, progress=False)
            figures[f"{way}, tightest"] = tight.to_dict()
            cells = [f"{one['peak_bytes'] / GB:.2f} / {one['seconds']:.3f}" for one in figures[way]]
            cells += [f"{tight.peak_bytes / GB:.2f} / {tight.seconds:.3f}", format_bytes(tight.limit_bytes)]
            table.append(note([way, *cells]))
            if way == "ours":
                print(tight, flush=True)
            del job, batch
            release()
        heads = ["no limit" if limit is None else format_bytes(limit) for limit in limits]
        title = f"\n{name}, {rows} x {TOKENS[size]} tokens: peak GB / seconds under a memory limit"
        print(render_table(["blocks", *heads, "tightest", "which is"], table, title=title))
        out[name] = figures
    return out


def plans(models: tuple[str, ...]) -> dict[str, Any]:
    """Checkpoint plans at three budgets, the full one with the highest limit that holds it."""
    figures = []
    for size, rows, budgets in (("tiny", 2, ["400MB", "200MB"]), ("1B", 8, ["22GB", "14GB", "9.5GB"])):
        if size not in models:
            continue
        table = []
        for budget in budgets:
            job = training(size)
            try:
                plan = mt.plan_checkpoints(
                    job.model, job.step, job.make_batch, batch_size=rows, budget=budget, state=job.state
                )
            except mt.BudgetError as error:
                table.append(note([budget, "-", "-", "-", "-", str(error)]))
                continue
            figures.append({"model": size, **plan.to_dict()})
            chosen = sum(1 for row in plan.blocks if row.checkpointed)
            cells = [f"{plan.predicted_peak_bytes / GB:.2f}", f"{plan.peak_bytes / GB:.2f}"]
            table.append(note([budget, f"{chosen} of {len(plan.blocks)}", *cells, f"{plan.measured_seconds:.4f}", ""]))
            del job, plan  # a plan keeps its model, which would count towards the next one's floor
            release()
        columns = ["budget", "checkpointed", "predicted peak GB", "measured GB", "seconds", "note"]
        print(render_table(columns, table, title=f"\nplan_checkpoints, {size}, batch {rows}"))
    return {"plans": figures}


def estimates(models: tuple[str, ...]) -> dict[str, Any]:
    """Predicted floors against measured ones."""
    cases: list[tuple[str, dict[str, Any], int]] = [
        ("tiny", {}, 2),
        ("tiny", LORA, 2),
        ("1B", {}, 8),
        ("1B", {"optimizer": "adamw"}, 4),
        ("1B", QLORA, 8),
        ("1B", LORA, 8),
        ("1B", {}, 1),
        ("1B", {}, 4),
        ("8B", LORA, 2),
        ("8B", QLORA, 4),
        ("8B", {**QLORA, "length": 8193, "linear_loss": True}, 1),
    ]
    table, figures = [], []
    for size, options, rows in cases:
        if size not in models:
            continue
        for checkpointed in (True,) if "length" in options else (False, True):
            job = training(size, **options)
            batch = job.make_batch(rows)
            mx.eval(batch)
            with mt.checkpoint_blocks(job.model) if checkpointed else nullcontext():
                estimate = mt.estimate_memory(job.step, batch, state=job.state)
                floor = measured(job, batch, limit=1, runs=5)["peak_bytes"]
            kind = {"lora": "LoRA", "bits": "on 4 bits", "optimizer": options.get("optimizer", "")}
            kind |= {"length": f"of {job.length - 1} tokens", "linear_loss": "without logits"}
            name = " ".join([size, *(kind[key] for key in options), f"x{rows}", "checkpointed" * checkpointed]).strip()
            ratio = estimate.floor_bytes / floor
            figures.append({"step": name, "predicted": estimate.floor_bytes, "measured": floor, "ratio": ratio})
            table.append(note([name, f"{estimate.floor_bytes / GB:.3f}", f"{floor / GB:.3f}", f"{ratio - 1:+.1%}"]))
            del job, batch
            release()
    print(render_table(["step", "predicted floor GB", "measured GB", "error"], table))
    return {"steps": figures}


def autobatch(models: tuple[str, ...]) -> dict[str, Any]:
    """The largest batches within budgets."""
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("tiny", {}, "40MB"),
        ("1B", {}, "40GB"),
        ("1B", {}, "100GB"),
        ("8B", LORA, "40GB"),
        ("8B", LORA, "100GB"),
        ("8B", QLORA, "40GB"),
    ]
    table, figures = [], []
    for size, options, budget in cases:
        if size not in models:
            continue
        job = training(size, **options)
        started = time.perf_counter()
        found = mt.autobatch(job.step, job.make_batch, budget=budget, state=job.state, progress=False)
        seconds = time.perf_counter() - started
        one = measured(job, job.make_batch(found.batch_size), limit=found.limit_bytes)
        above = sum(1 for t in found.trials if t.peak_bytes is not None and t.peak_bytes > found.budget_bytes)
        figures.append({"model": size, "budget": budget, "search_seconds": seconds, **found.to_dict()})
        print(found, flush=True)
        cells = [found.batch_size, f"{found.peak_bytes / GB:.2f}", len(found.trials), above]
        times = [f"{seconds:.1f}", f"{found.first_seconds:.1f}", f"{found.repeated_seconds / one['seconds']:.1f}"]
        kind = {"lora": " LoRA", "bits": " on 4 bits"}
        table.append(note([size + "".join(kind[key] for key in options), budget, *cells, *times]))
        del job
        release()
    columns = ["model", "budget", "batch", "peak GB", "trials", "above budget"]
    columns += ["search s", "of it in first steps", "other steps, in steps at the answer"]
    print(render_table(columns, table))
    return {"searches": figures}


def autofit(models: tuple[str, ...]) -> dict[str, Any]:
    """Tokens a second at a budget: autofit against what anybody would try."""
    out = {}
    for size, budget, most in (("tiny", "40MB", 8), ("1B", "40GB", 64)):
        if size not in models:
            continue
        table: list[list[Any]] = []
        figures: dict[str, float] = {}

        def rate(job: gpu_models.Training, batch_size: int, limit: int | None, tokens: int = TOKENS[size]) -> float:
            one = measured(job, job.make_batch(batch_size), limit=limit, runs=6)
            return batch_size * tokens / one["seconds"]

        for way in ("autofit", "plain, largest batch", "all checkpointed, largest batch", "mlx-lm's default batch 4"):
            job = training(size)
            if way == "autofit":
                fit = mt.autofit(
                    job.model, job.step, job.make_batch, budget=budget, max_batch=most, state=job.state, progress=False
                )
                print(fit, flush=True)
                with fit.applied():
                    figures[way] = rate(job, fit.batch_size, None)
                batch = fit.batch_size
            elif way.startswith("mlx-lm"):
                batch = 4
                figures[way] = rate(job, batch, None)
            else:
                with mt.checkpoint_blocks(job.model) if way.startswith("all") else nullcontext():
                    found = mt.autobatch(
                        job.step, job.make_batch, budget=budget, max_batch=most, state=job.state, progress=False
                    )
                    batch = found.batch_size
                    figures[way] = rate(job, batch, found.limit_bytes)
            table.append(note([way, batch, f"{figures[way]:.0f}"]))
            del job
            release()
        print(render_table(["way", "batch", "tokens a second"], table, title=f"\n{size} in {budget}"))
        out[size] = figures
    return out
