"""Training steps of real size priced for CUDA on any machine, beside what one H200 measured.

    python tests/benchmarks/backends.py [--backend cuda] [--only NAME ...] [--measured FILE] [--json FILE]

Nothing is evaluated: models are built lazily, and a laptop prices what needs 32 GB. Measured figures are those of
docs/measurements/gpu.md; `--measured` takes newer ones from what `gpu.py --only estimates --json FILE` wrote. A figure
is the smallest of five peaks under a limit of one byte; peaks under others are of the checkpointed step of 8 rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_models
import loss
import mlx.core as mx
from weights_first import in_the_old_order

import mlx_tune as mt
from mlx_tune.presentation.tables import render_table

GB = 10**9
LORA, QLORA = {"lora": True}, {"lora": True, "bits": 4}

#: name: (size, options, rows, checkpointed, measured bytes), as `gpu.py` names them.
STEPS: dict[str, tuple[str, dict[str, Any], int, bool, int | None]] = {
    "1B x1": ("1B", {}, 1, False, 6_795_712_864),
    "1B x1 checkpointed": ("1B", {}, 1, True, 5_433_579_616),
    "1B x4": ("1B", {}, 4, False, 12_911_264_088),
    "1B x4 checkpointed": ("1B", {}, 4, True, 6_427_879_000),
    "1B x8": ("1B", {}, 8, False, 21_120_868_696),
    "1B x8 checkpointed": ("1B", {}, 8, True, 8_155_441_752),
    "1B adamw x4": ("1B", {"optimizer": "adamw"}, 4, False, 14_988_628_352),
    "1B adamw x4 checkpointed": ("1B", {"optimizer": "adamw"}, 4, True, 8_873_219_720),
    "1B LoRA x8": ("1B", LORA, 8, False, 32_342_966_896),
    "1B LoRA x8 checkpointed": ("1B", LORA, 8, True, 7_282_725_440),
    "1B LoRA on 4 bits x8": ("1B", QLORA, 8, False, 30_342_000_000),
    "1B LoRA on 4 bits x8 checkpointed": ("1B", QLORA, 8, True, 6_058_000_000),
    "1B x4 of 1000 tokens": ("1B", {"length": 1001}, 4, False, 13_165_454_176),
    "0.6B vocabulary of 151,936, LoRA 4 x 2048 checkpointed": ("qwen", {"loss": "plain"}, 4, True, 11_696_619_640),
    "the same, linear_cross_entropy": ("qwen", {"loss": "linear_cross_entropy"}, 4, True, 4_252_661_112),
    "8B LoRA x2": ("8B", LORA, 2, False, None),
    "8B LoRA x2 checkpointed": ("8B", LORA, 2, True, None),
    "8B LoRA on 4 bits x4": ("8B", QLORA, 4, False, None),
    "8B LoRA on 4 bits x4 checkpointed": ("8B", QLORA, 4, True, None),
}
#: The limit in GB and the lowest and highest peak measured under it.
LIMITS = {
    14: (14.29, 14.64),
    12: (12.72, 12.83),
    10: (10.16, 11.47),
    9: (10.98, 10.98),
    8: (9.00, 9.27),
    7: (8.69, 8.81),
}
LIMITED = "1B x8 checkpointed"


@contextmanager
def nothing_evaluated() -> Iterator[None]:
    """Let models be built as they are for a GPU, with `mx.eval` doing nothing."""
    with mock.patch.object(mx, "eval", return_value=None):
        yield


def built(size: str, options: dict[str, Any], rows: int, checkpointed: bool) -> tuple[Any, Any, Any]:
    """A step, a description of its batch, and its state; nothing of them is there."""
    with nothing_evaluated():
        if size == "qwen":
            model = loss.qwen_shape(28)
            optimizer = loss.lora(model)
            model.train()
            optimizer.init(model.trainable_parameters())
            captured = [model.state, optimizer.state, mx.random.state]
            step = loss.step_of(model, loss.LOSSES[options["loss"]], optimizer)
            step = partial(mx.compile, inputs=captured, outputs=captured)(step)
            state, length = (model, optimizer), 2049
        else:
            job = gpu_models.training(size, **options)
            step, state, model, length = job.step, job.state, job.model, job.length
    if checkpointed:
        mt.checkpoint_blocks(model)
    return step, mt.ArraySpec((rows, length), mx.int32), state


def priced(name: str, backend: str, limit: int | None = None) -> mt.MemoryEstimate:
    """The estimate of one step."""
    size, options, rows, checkpointed, _ = STEPS[name]
    step, batch, state = built(size, options, rows, checkpointed)
    with in_the_old_order():  # in which they were measured
        return mt.estimate_memory(step, batch, state=state, backend=backend, limit=limit)


def measured_in(file: Path) -> dict[str, int]:
    """The measured bytes by step, out of what `gpu.py` wrote."""
    steps = json.loads(file.read_text())["estimates"]["steps"]
    return {step["step"]: int(step["measured"]) for step in steps}


def summary(errors: list[float]) -> str:
    """How far the estimates are off, on a line."""
    sizes = [abs(error) for error in errors]
    return (
        f"{len(errors)} steps: median error {statistics.median(sizes):.2%}, worst {max(sizes):.2%}, furthest below the "
        f"truth {min(errors):+.2%}."
    )


def main() -> None:
    """Price every step, and print what was measured beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="cuda", choices=("cuda", "metal", "cpu"))
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="NAME")
    parser.add_argument("--measured", type=Path, help="figures that gpu.py wrote, instead of those of the page")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    known = {name: case[-1] for name, case in STEPS.items()} | (
        measured_in(options.measured) if options.measured else {}
    )
    table, figures = [], []
    for name in options.only:
        estimate = priced(name, options.backend)
        truth = known[name] if options.backend == "cuda" else None
        error = None if truth is None else estimate.floor_bytes / truth - 1
        figures.append({"step": name, "predicted": estimate.floor_bytes, "measured": truth, "error": error})
        told = ("", "") if truth is None or error is None else (f"{truth / GB:.3f}", f"{error:+.2%}")
        cells = [f"{estimate.floor_bytes / GB:.3f}", *told, f"{estimate.peak_bytes / GB:.2f}"]
        table.append([name, *cells, f"{estimate.trace_seconds:.1f}"])
        print(*table[-1], sep="  ", flush=True)
    errors = [figure["error"] for figure in figures if figure["error"] is not None]
    columns = ["step", "floor GB", "measured", "error", "without a limit up to", "seconds to predict"]
    print(
        render_table(columns, table, title=f"\nPriced for {options.backend}", notes=[summary(errors)] if errors else [])
    )
    if options.backend == "cuda" and LIMITED in options.only:
        rows = []
        for limit, (low, high) in LIMITS.items():
            peak = priced(LIMITED, "cuda", limit * GB).peak_bytes / GB
            rows.append([f"{limit} GB", f"{peak:.2f}", f"{low:.2f} to {high:.2f}", f"{peak / high - 1:+.1%}"])
        print(
            render_table(
                ["limit", "peak GB", "measured", "against the highest"], rows, title=f"\n{LIMITED} under limits"
            )
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
