"""The figures on a GPU: python tests/benchmarks/gpu.py [--quick] [--only SECTION ...] [--json FILE]

Correctness first, then tables; each pair that is compared was measured in this run. `--quick` runs every section at
toy sizes, on any machine, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import gpu_models
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.devices import machine
from mlx_tune.tables import render_table
from mlx_tune.units import format_bytes, format_seconds

GB = 10**9
SECTIONS: dict[str, Callable[[bool], dict[str, Any]]] = {}


def section(function: Callable[[bool], dict[str, Any]]) -> Callable[[bool], dict[str, Any]]:
    """List a section under its name."""
    SECTIONS[function.__name__] = function
    return function


def note(row: list[Any]) -> list[Any]:
    """Show a row at once, so that a run that is cut short still says what it found."""
    print("  ...", *row, flush=True)
    return row


def release() -> None:
    """Give back what earlier sections held."""
    gc.collect()
    mx.clear_cache()


def measured(job: gpu_models.Training, batch: mx.array, *, limit: int | None = None, runs: int = 4) -> dict[str, Any]:
    """Peak and seconds of a step after one that compiles: the smallest peak, the median time."""
    peaks, times = [], []
    with mt.memory_limit(limit) if limit is not None else nullcontext():
        for run in range(runs + 1):
            release()
            with mt.track_memory() as m:
                mx.eval(job.step(batch), job.model.state, job.optimizer.state)
            if run:
                peaks.append(m.peak_bytes)
                times.append(m.seconds)
    return {"peak_bytes": min(peaks), "seconds": statistics.median(times), "limit_bytes": limit}


@contextmanager
def mlx_lm_checkpointing(model: nn.Module) -> Iterator[None]:
    """mlx-lm's own way, taken back afterwards (it patches the class and never does)."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    kind = type(model.layers[0])
    before = kind.__call__
    grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        kind.__call__ = before


@section
def correctness(quick: bool) -> dict[str, Any]:
    """Equalities that everything else leans on."""
    checks = {}
    job = gpu_models.training("tiny", length=65)
    batch = job.make_batch(2)

    def loss_of(tokens: mx.array) -> mx.array:
        logits = job.model(tokens[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    report = mt.verify_checkpoint(job.model, loss_of, batch)
    checks["checkpointed gradients equal plain ones"] = report.ok
    lora = gpu_models.training("tiny", length=65, lora=True)

    def lora_loss(tokens: mx.array) -> mx.array:
        logits = lora.model(tokens[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    checks["so they do with dropout in adapters"] = mt.verify_checkpoint(lora.model, lora_loss, batch).ok

    from mlx_tune.quantization.affine import dequantize_float32, quantize_affine

    weight = mx.random.normal((256, 512)).astype(mx.bfloat16)
    x = mx.random.normal((4, 512))  # float32: in bfloat16 the kernel's own rounding would be all there is to see
    for bits in (2, 3, 4, 6, 8):
        codes, scales, biases = quantize_affine(weight, bits, 64)
        wide = (codes, scales.astype(mx.float32), biases.astype(mx.float32))
        fused = mx.quantized_matmul(x, *wide, transpose=True, group_size=64, bits=bits)
        exact = x @ dequantize_float32(codes, scales, biases, bits=bits, group_size=64).T
        # 1e-3: on a GPU float32 products may run in TF32, which carries ten bits.
        close = mx.abs(fused - exact).max() <= 1e-3 * mx.abs(exact).max()
        checks[f"quantized product equals the dequantized one at {bits} bits"] = bool(close.item())

    before = {k: mx.array(v) for k, v in tree_flatten(job.model.parameters())}
    mx.eval(before)
    found = mt.autobatch(job.step, job.make_batch, budget="1GB", max_batch=8, state=job.state, progress=False)
    same = all(mx.array_equal(v, before[k]).item() for k, v in tree_flatten(job.model.parameters()))
    checks[f"autobatch (found {found.batch_size}) leaves every parameter as it was"] = same
    print(render_table(["check", "holds"], [[k, "yes" if v else "NO"] for k, v in checks.items()]))
    return {"checks": checks}


@section
def checkpointing(quick: bool) -> dict[str, Any]:
    """Peak and time of a step, each way of checkpointing, free and under limits."""
    out: dict[str, Any] = {}
    small: list[int | None] = [None, GB // 50]
    cases: list[Any] = [("tiny", {}, 2, 65, small), ("tiny", {"lora": True, "bits": 4}, 2, 65, small)]
    if not quick:
        cases = [
            ("1B", {}, 8, 1025, [None, 16 * GB, 12 * GB, 10 * GB, 8 * GB]),
            ("8B", {"lora": True}, 4, 1025, [None, 24 * GB, 20 * GB]),
            ("8B", {"lora": True, "bits": 4}, 4, 1025, [None, 12 * GB, 8 * GB]),
        ]
    for size, options, rows, length, limits in cases:
        name = size + (" LoRA" if options.get("lora") else "") + (" on 4 bits" if options.get("bits") else "")
        table, figures = [], {}
        for way in ("plain", "mlx-lm", "ours", "ours, every 2nd"):
            job = gpu_models.training(size, length=length, **options)
            batch = job.make_batch(rows)
            every = 2 if way.endswith("2nd") else 1
            context = (
                mlx_lm_checkpointing(job.model)
                if way == "mlx-lm"
                else mt.checkpoint_blocks(job.model, every=every)
                if way.startswith("ours")
                else nullcontext()
            )
            with context:
                figures[way] = [measured(job, batch, limit=limit) for limit in limits]
                tight = None
                if way == "ours":
                    tight = mt.tightest_limit(job.step, batch, state=job.state, slowdown=0.02, progress=False)
                    figures["tightest"] = tight.to_dict()
            cells = [f"{one['peak_bytes'] / GB:.2f} / {one['seconds']:.3f}" for one in figures[way]]
            table.append(note([way, *cells]))
            if tight is not None:
                print(tight, flush=True)
            del job, batch, context
            release()
        heads = ["no limit" if limit is None else format_bytes(limit) for limit in limits]
        title = f"\n{name}, {rows} x {length - 1} tokens: peak GB / seconds under a memory limit"
        print(render_table(["blocks", *heads], table, title=title))
        out[name] = figures
    return out


@section
def plans(quick: bool) -> dict[str, Any]:
    """Checkpoint plans of the 1 B model at three budgets."""
    job = gpu_models.training("tiny" if quick else "1B", length=65 if quick else 1025)
    rows, table, figures = (2 if quick else 8), [], []
    for budget in ("400MB", "200MB") if quick else ("22GB", "14GB", "9GB"):
        try:
            plan = mt.plan_checkpoints(
                job.model, job.step, job.make_batch, batch_size=rows, budget=budget, state=job.state
            )
        except mt.BudgetError as error:
            table.append([budget, "-", "-", "-", "-", str(error)])
            continue
        done = plan.to_dict()
        figures.append(done)
        chosen = sum(1 for row in plan.blocks if row.checkpointed)
        table.append(
            note(
                [
                    budget,
                    f"{chosen} of {len(plan.blocks)}",
                    f"{plan.predicted_peak_bytes / GB:.2f}",
                    f"{plan.measured_peak_bytes / GB:.2f}",
                    f"{plan.measured_seconds:.4f}",
                    "",
                ]
            )
        )
        release()
    columns = ["budget", "checkpointed", "predicted peak GB", "measured GB", "seconds", "note"]
    print(render_table(columns, table, title="\nplan_checkpoints"))
    return {"plans": figures}


@section
def estimates(quick: bool) -> dict[str, Any]:
    """Predicted floors against measured ones."""
    cases = [("tiny", {}, 2), ("tiny", {"lora": True}, 2)]
    if not quick:
        cases = [
            ("1B", {}, 1),
            ("1B", {}, 4),
            ("1B", {}, 8),
            ("1B", {"optimizer": "adamw"}, 4),
            ("1B", {"lora": True}, 8),
            ("1B", {"lora": True, "bits": 4}, 8),
            ("8B", {"lora": True}, 2),
            ("8B", {"lora": True, "bits": 4}, 4),
        ]
    table, figures = [], []
    for size, options, rows in cases:
        for checkpointed in (False, True):
            job = gpu_models.training(size, length=65 if quick else 1025, **options)
            batch = job.make_batch(rows)
            mx.eval(batch)
            with mt.checkpoint_blocks(job.model) if checkpointed else nullcontext():
                estimate = mt.estimate_memory(job.step, batch, state=job.state)
                floor = measured(job, batch, limit=1, runs=5)["peak_bytes"]
            name = f"{size} {' '.join(map(str, options.values()))} x{rows}{' checkpointed' if checkpointed else ''}"
            ratio = estimate.floor_bytes / floor
            figures.append({"step": name, "predicted": estimate.floor_bytes, "measured": floor, "ratio": ratio})
            table.append(note([name, f"{estimate.floor_bytes / GB:.3f}", f"{floor / GB:.3f}", f"{ratio:.3f}"]))
            del job, batch
            release()
    print(render_table(["step", "predicted floor GB", "measured GB", "ratio"], table))
    return {"steps": figures}


@section
def autobatch(quick: bool) -> dict[str, Any]:
    """Batches for a budget, and recovery from an out-of-memory on purpose."""
    cases = [("tiny", {}, "500MB", 65)]
    if not quick:
        cases = [("1B", {}, "40GB", 1025), ("1B", {}, "100GB", 1025)]
        cases += [("8B", {"lora": True}, budget, 1025) for budget in ("40GB", "100GB")]
    table, figures = [], []
    for size, options, budget, length in cases:
        job = gpu_models.training(size, length=length, **options)
        started = time.perf_counter()
        found = mt.autobatch(job.step, job.make_batch, budget=budget, state=job.state, progress=False)
        seconds = time.perf_counter() - started
        one = measured(job, job.make_batch(found.batch_size), limit=found.limit_bytes)
        above = sum(1 for t in found.trials if t.peak_bytes is not None and t.peak_bytes > found.budget_bytes)
        figures.append({"model": size, "budget": budget, "search_seconds": seconds, **found.to_dict()})
        table.append(
            note(
                [
                    f"{size}{' LoRA' if options else ''}",
                    budget,
                    found.batch_size,
                    f"{found.peak_bytes / GB:.2f}",
                    len(found.trials),
                    above,
                    f"{seconds / one['seconds']:.1f}",
                ]
            )
        )
        del job
        release()
    columns = ["model", "budget", "batch", "peak GB", "trials", "above budget", "search time in steps"]
    print(render_table(columns, table))
    return {"searches": figures}


@section
def recovery(quick: bool) -> dict[str, Any]:
    """A real out-of-memory from plain allocations, and the same step before and after it."""
    job = gpu_models.training("tiny", length=65)
    batch = job.make_batch(2)
    mx.eval(batch)
    from mlx_tune.state import Snapshot

    def one() -> list[Any]:
        with Snapshot(job.state):
            loss = job.step(batch)
            mx.eval(loss, job.model.state)
            return [loss.item(), *(mx.array(v) for _, v in tree_flatten(job.model.parameters()))]

    before = one()
    mx.eval(before[1:])
    raised = None
    if machine().backend == "cuda":
        held = []
        try:
            while True:
                held.append(mx.ones((4000, GB // 1000), mx.uint8))
                mx.eval(held[-1])
        except RuntimeError as error:
            raised = str(error)
        del held
        release()
    after = one()
    same = before[0] == after[0] and all(
        mx.array_equal(a, b).item() for a, b in zip(before[1:], after[1:], strict=True)
    )
    print(f"\nout of memory on purpose: {raised}\nthe step afterwards is bit-identical: {same}")
    if raised is not None:
        print(mt.explain(RuntimeError(raised)))
    return {"raised": raised, "identical": same}


@section
def autofit(quick: bool) -> dict[str, Any]:
    """Tokens a second at a budget: autofit against plain and fully checkpointed at their largest batches."""
    size, budget, length = ("tiny", "500MB", 65) if quick else ("1B", "40GB", 1025)
    table, figures = [], {}

    def rate(job: gpu_models.Training, batch_size: int, limit: int | None) -> float:
        one = measured(job, job.make_batch(batch_size), limit=limit, runs=6)
        return batch_size * (length - 1) / one["seconds"]

    most = 8 if quick else 64
    for way in ("autofit", "plain, largest batch", "all checkpointed, largest batch", "mlx-lm's default batch 4"):
        job = gpu_models.training(size, length=length)
        if way == "autofit":
            fit = mt.autofit(job.model, job.step, job.make_batch, budget=budget, state=job.state)
            print(fit)
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
    return figures


@section
def quantizing(quick: bool) -> dict[str, Any]:
    """Seconds and peak memory of quantizing, and the speed of the kernels."""
    table, figures = [], []
    for size in ("tiny",) if quick else ("1B", "8B"):
        for effort in ("fast", "best"):
            for bits in (4,) if size == "8B" else (4, 3):
                model = gpu_models.build(size)
                count, held = gpu_models.parameters(model), mx.get_active_memory()
                with mt.track_memory() as m:
                    mt.quantize_model(model, bits, 64, method="optimal", effort=effort, progress=False)
                    mx.eval(model.parameters())
                figures.append({"model": size, "effort": effort, "bits": bits, "held_bytes": held, **m.to_dict()})
                table.append(
                    note(
                        [
                            size,
                            effort,
                            bits,
                            f"{m.seconds:.2f}",
                            f"{m.seconds / count * 1e6 * 1e3:.3f}",
                            format_bytes(held),
                            format_bytes(m.peak_bytes),
                        ]
                    )
                )
                del model
                release()
    columns = ["model", "effort", "bits", "seconds", "ms a million weights", "model before", "peak while quantizing"]
    print(render_table(columns, table))
    return {"quantizing": figures, "kernels": _kernels(quick)}


def _kernels(quick: bool) -> list[dict[str, Any]]:
    """Quantized against bf16 products, by mode and rows."""
    width = 512 if quick else 4096
    weight = mx.random.normal((width, width)).astype(mx.bfloat16) * 0.02
    table, figures = [], []

    def timed(product: Callable[[mx.array], mx.array], x: mx.array) -> float:
        repeats = 5 if quick else 50
        times = []
        for _ in range(5):
            mx.eval(product(x))
            mx.synchronize()
            started = time.perf_counter()
            mx.eval([product(x + i) for i in range(repeats)])
            mx.synchronize()
            times.append((time.perf_counter() - started) / repeats)
        return min(times)

    modes = [("affine", 4, 64), ("affine", 8, 64), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)]
    for mode, bits, group in modes:
        packed = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
        mx.eval(packed)
        row: list[Any] = [mode, bits]

        def quantized(x: mx.array, packed: Any = packed, mode: str = mode, bits: int = bits, group: int = group):
            return mx.quantized_matmul(x, *packed, transpose=True, group_size=group, bits=bits, mode=mode)

        for rows in (1, 16, 256, 4096) if not quick else (1, 16):
            x = mx.random.normal((rows, width)).astype(mx.bfloat16)
            mx.eval(x)
            whole, packed_seconds = timed(lambda x: x @ weight.T, x), timed(quantized, x)
            figures.append({"mode": mode, "bits": bits, "rows": rows, "bf16": whole, "quantized": packed_seconds})
            row.append(f"{whole / packed_seconds:.2f}")
        table.append(row)
    rows_named = [f"{n} rows" for n in ((1, 16, 256, 4096) if not quick else (1, 16))]
    title = f"\nspeed of the quantized product over the bf16 one, {width} x {width}"
    print(render_table(["mode", "bits", *rows_named], table, title=title))
    return figures


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that everything runs")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine().to_dict(), "mlx": mx.__version__}
    print(f"{machine()}, mlx {mx.__version__}")
    for name in arguments.only:
        print(f"\n== {name}: {SECTIONS[name].__doc__}")
        started = time.perf_counter()
        try:
            results[name] = SECTIONS[name](arguments.quick)
        except Exception as error:  # one section that fails must not take the others' figures with it
            traceback.print_exc()
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"({format_seconds(time.perf_counter() - started)})", flush=True)
        release()
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(results, file, indent=2, default=str)


if __name__ == "__main__":
    main()
