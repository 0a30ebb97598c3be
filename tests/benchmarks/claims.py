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
from mlx_tune.tables import render_table


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
    """Memory before and after the parts of loading a file: MLX's own count, and the process's resident pages."""
    process = psutil.Process()
    found: list[dict[str, Any]] = []

    def look(moment: str) -> None:
        found.append({"moment": moment, "active": mx.get_active_memory(), "resident": process.memory_info().rss})

    count = 8 if quick else 32
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "weights.safetensors")
        mx.save_safetensors(file, {f"w{i}": mx.random.normal((2**21,)) for i in range(count)})
        mx.clear_cache()
        look("before")
        weights = mx.load(file)
        look("loaded, not used")
        mx.eval(weights["w0"])
        look("one of them used")
        mx.eval(weights)
        look("all used")
        half = {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}
        mx.eval(half)
        look("and cast to bfloat16")
    first = found[0]
    rows = [
        [row["moment"], mt.format_bytes(row["active"] - first["active"]),
         mt.format_bytes(max(row["resident"] - first["resident"], 0))]
        for row in found
    ]  # fmt: skip
    title = f"Loading {mt.format_bytes(count * 2**23)} of float32 weights, more than before"
    print(render_table(["moment", "MLX counts", "the process holds"], rows, title=title))
    return found


def evaluating(quick: bool) -> list[dict[str, Any]]:
    """Three steps of a perceptron of eight blocks, with `mx.eval` in different places; the last step's figures."""
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
        figures = []
        for _ in range(3):
            with mt.track_memory() as memory:
                loss, gradients = gradient(model, x)
                finish(loss, gradients, model, optimizer)
                del loss, gradients
            figures.append((memory.peak_bytes, memory.active_bytes, memory.seconds))
        peak, active, seconds = figures[-1]
        found.append({"evaluate": name, "peak": peak, "held": active, "seconds": seconds})
        del model, optimizer, gradient, blocks
    table = [
        [row["evaluate"], mt.format_bytes(row["peak"]), mt.format_bytes(row["held"]), f"{row['seconds'] * 1e3:.0f} ms"]
        for row in found
    ]
    print(render_table(["evaluate", "peak", "held after the step", "time"], table, title="Where to call mx.eval"))
    return found


def batches(quick: bool) -> list[dict[str, Any]]:
    """The quantized product's speed over the plain one in the activations' dtype."""
    width, dtype = 256 if quick else 512, mx.float32
    weight = mx.random.normal((width, width)).astype(dtype)
    formats: dict[str, dict[str, Any]] = {
        "affine 4 bits, weights": {"mode": "affine", "bits": 4, "group_size": 64},
        "affine 8 bits, weights": {"mode": "affine", "bits": 8, "group_size": 64},
        "mxfp4, weights": {"mode": "mxfp4", "bits": 4, "group_size": 32},
    }
    counts = (1, 16) if quick else (1, 16, 64)
    found = []
    for name, options in formats.items():
        packed = mx.quantize(weight, **options)
        mx.eval(packed)
        for rows in counts:
            x = mx.random.normal((rows, width)).astype(dtype)
            mx.eval(x)
            plain = _seconds(lambda x=x: x @ weight.T)
            fused = _seconds(
                lambda x=x, packed=packed, options=options: mx.quantized_matmul(x, *packed, transpose=True, **options)
            )
            found.append({"format": name, "rows": rows, "speed": plain / fused})
    table = [
        [name, *(f"{row['speed']:.3f}" for row in found if row["format"] == name)] for name in formats
    ] + [["nvfp4, weights and activations", *([_both(width)] * len(counts))]]  # fmt: skip
    columns = ["format", *(f"{rows} rows" for rows in counts)]
    print(render_table(columns, table, title=f"Speed over the {dtype} product, {width} x {width}"))
    return found


def _both(width: int) -> str:
    layer = nn.QQLinear(width, width, group_size=16, bits=4, mode="nvfp4")
    try:
        mx.eval(layer(mx.ones((1, width))))
    except (RuntimeError, ValueError) as error:
        return f"raises: {error}"
    return "runs; not timed"


def _seconds(work: Callable[[], mx.array]) -> float:
    mx.eval(work())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


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
