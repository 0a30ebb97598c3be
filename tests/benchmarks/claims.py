"""What common guides say about MLX, looked at.

    python tests/benchmarks/claims.py [--quick] [--only SECTION ...] [--json FILE]

- sizes: bytes of a model's weights at 8 and 4 bits
- loading: whether weights from a file are in memory when they are loaded, when they are used, and twice
- evaluating: peak and time of the same training step with `mx.eval` in different places
- batches: speed of the quantized product over the unquantized one, by rows, with weights alone quantized or both
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import psutil
from workload_models import language_model

import mlx_tune as mt
from mlx_tune.devices import footprint_bytes
from mlx_tune.presentation.tables import render_table

#: The formats of `batches`: a name, whether inputs are quantized too, and what MLX is told.
FORMATS: list[tuple[str, bool, dict[str, Any]]] = [
    ("affine 4 bits, weights", False, {"mode": "affine", "bits": 4, "group_size": 64}),
    ("affine 8 bits, weights", False, {"mode": "affine", "bits": 8, "group_size": 64}),
    ("mxfp4, weights", False, {"mode": "mxfp4", "bits": 4, "group_size": 32}),
    ("nvfp4, weights", False, {"mode": "nvfp4", "bits": 4, "group_size": 16}),
    ("nvfp4, weights and activations", True, {"mode": "nvfp4", "bits": 4, "group_size": 16}),
    ("mxfp8, weights and activations", True, {"mode": "mxfp8", "bits": 8, "group_size": 32}),
]


def sizes(quick: bool) -> list[dict[str, Any]]:
    """Bytes at 8 and 4 bits of a Llama in bfloat16, the embedding included."""
    found = []
    for bits in (8, 4):
        model = language_model("llama", hidden_size=128 if quick else 512, vocab_size=512 if quick else 8192)
        model.set_dtype(mx.bfloat16)
        plan = mt.plan_quantization(model, bits, 64)
        found.append({"bits": bits, "before": plan.size_before_bytes, "after": plan.size_after_bytes})
    rows = [
        [row["bits"], mt.format_bytes(row["before"]), mt.format_bytes(row["after"]),
         f"{100 * (1 - row['after'] / row['before']):.1f} %"]
        for row in found
    ]  # fmt: skip
    print(render_table(["bits", "bfloat16", "quantized", "smaller by"], rows, title="Sizes, groups of 64"))
    return found


def loading(quick: bool) -> list[dict[str, Any]]:
    """Memory before and after the parts of loading a file: MLX's own count, and what the system charges the process.

    Where the system tells what a process has mapped (Linux), also whether the file is.
    """
    found: list[dict[str, Any]] = []
    count = 8 if quick else 32
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "weights.safetensors")

        def look(moment: str) -> None:
            maps = getattr(psutil.Process(), "memory_maps", None)
            mapped = None if maps is None else any(region.path == file for region in maps())
            figures = {"active": mx.get_active_memory(), "process": footprint_bytes(), "mapped": mapped}
            found.append({"moment": moment, **figures})

        mx.save_safetensors(file, {f"w{i}": mx.random.normal((2**21,)) for i in range(count)})
        mx.clear_cache()
        look("before")
        weights = mx.load(file)
        look("loaded, not used")
        mx.eval(weights["w0"])
        look(f"one of {count} used")
        mx.eval(weights)
        look("all used")
        half = {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}
        mx.eval(half)
        look("and cast to bfloat16")
        del weights
        mx.clear_cache()
        look("the originals dropped")
    first, *rest = found
    said = {True: "yes", False: "no", None: "not told"}
    rows = [
        [row["moment"], mt.format_bytes(row["active"] - first["active"]),
         mt.format_bytes(max(row["process"] - first["process"], 0)), said[row["mapped"]]]
        for row in rest
    ]  # fmt: skip
    title = f"Loading {mt.format_bytes(count * 2**23)} of float32 weights, more than before"
    print(render_table(["moment", "MLX counts", "the process holds", "file mapped"], rows, title=title))
    return found


def evaluating(quick: bool) -> list[dict[str, Any]]:
    """Steps of a perceptron of eight blocks, with `mx.eval` in different places.

    The third step runs freely; the fourth under a memory limit of one byte, so that it does not depend on how far MLX
    runs ahead.
    """
    width, rows = (64, 256) if quick else (256, 1024)

    def everything(loss: mx.array, gradients: Any, model: nn.Module, optimizer: optim.Optimizer) -> None:
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)

    def in_pieces(loss: mx.array, gradients: Any, model: nn.Module, optimizer: optim.Optimizer) -> None:
        mx.eval(loss)
        mx.eval(gradients)
        everything(loss, gradients, model, optimizer)

    def the_loss(loss: mx.array, gradients: Any, model: nn.Module, optimizer: optim.Optimizer) -> None:
        optimizer.update(model, gradients)
        mx.eval(loss)

    ways = {"once, all of it": everything, "loss, gradients, update": in_pieces, "the loss alone": the_loss}
    found = []
    for name, finish in ways.items():
        mx.random.seed(0)
        blocks = [nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(8)]
        model, optimizer = nn.Sequential(*blocks), optim.AdamW(1e-3)
        optimizer.init(model.trainable_parameters())
        gradient = nn.value_and_grad(model, lambda model, x: model(x).square().mean())
        x = mx.random.normal((rows, width))
        mx.eval(model.parameters(), optimizer.state, x)

        def step(
            finish: Any = finish, model: Any = model, optimizer: Any = optimizer, x: Any = x, gradient: Any = gradient
        ) -> Any:
            with mt.track_memory() as memory:
                loss, gradients = gradient(model, x)
                finish(loss, gradients, model, optimizer)
                del loss, gradients
            return memory

        *_, free = (step() for _ in range(3))
        figures = {"peak": free.peak_bytes, "held": free.active_bytes, "seconds": free.seconds}
        mx.eval(model.parameters(), optimizer.state)
        with mt.memory_limit(1):
            held_back = min((step() for _ in range(3)), key=lambda memory: memory.peak_bytes)
        found.append({"evaluate": name, **figures, "floor": held_back.peak_bytes})
        del model, optimizer, gradient, blocks, step
    table = [
        [row["evaluate"], mt.format_bytes(row["peak"]), mt.format_bytes(row["floor"]), mt.format_bytes(row["held"]),
         f"{row['seconds'] * 1e3:.0f} ms"]
        for row in found
    ]  # fmt: skip
    columns = ["evaluate", "peak", "peak, held back", "held after the step", "time"]
    print(render_table(columns, table, title="Where to call mx.eval"))
    return found


def batches(quick: bool) -> list[dict[str, Any]]:
    """The quantized product's speed over the plain one, in the dtype that the device is quick in."""
    gpu = mx.default_device() == mx.Device(mx.gpu)
    dtype = mx.bfloat16 if gpu else mx.float32
    width = 256 if quick else 4096 if gpu else 512
    counts = (1, 16) if quick else (1, 16, 64, 512) if gpu else (1, 16, 64)
    weight = mx.random.normal((width, width)).astype(dtype)
    found: list[dict[str, Any]] = []
    for name, both, options in FORMATS:
        packed = mx.quantize(weight, **options)
        mx.eval(packed)
        for rows in counts:
            x = mx.random.normal((rows, width)).astype(dtype)
            mx.eval(x)

            def fused(x: mx.array = x, packed: Any = packed, both: bool = both, options: Any = options) -> mx.array:
                if both:
                    return mx.qqmm(x, packed[0], scales=packed[1], **options)
                return mx.quantized_matmul(x, *packed, transpose=True, **options)

            try:
                speed: float | str = _ratio(lambda x=x: x @ weight.T, fused)
            except (RuntimeError, ValueError) as error:
                speed = f"raises: {error}"
            found.append({"format": name, "rows": rows, "speed": speed})
    table = [[name, *(_cell(row["speed"]) for row in found if row["format"] == name)] for name, *_ in FORMATS]
    columns = ["format", *(f"{rows} rows" for rows in counts)]
    print(render_table(columns, table, title=f"Speed over the {dtype} product, {width} x {width}"))
    return found


def _cell(speed: float | str) -> str:
    return speed if isinstance(speed, str) else f"{speed:.3f}"


def _ratio(plain: Callable[[], mx.array], other: Callable[[], mx.array]) -> float:
    """How many times as fast the other is: the median of nine turns, each of which times both."""
    mx.eval(plain(), other())
    ratios = []
    for _ in range(9):
        seconds = []
        for work in (plain, other):
            start = time.perf_counter()
            mx.eval(work())
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def main() -> None:
    """Print the tables."""
    sections = (sizes, loading, evaluating, batches)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=[section.__name__ for section in sections])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for section in sections:
        if options.only is None or section.__name__ in options.only:
            found[section.__name__] = section(options.quick)
            print()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
