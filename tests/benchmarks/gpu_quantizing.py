"""Sections of gpu.py about quantization: how long it takes, what it needs, and how fast the products are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gpu_models
import mlx.core as mx
from gpu_measuring import note, release

import mlx_tune as mt
from mlx_tune.presentation.tables import render_table
from mlx_tune.units import format_bytes


def quantizing(models: tuple[str, ...]) -> dict[str, Any]:
    """Seconds and peak memory of quantizing. The first row's seconds hold compiling the kernels, too."""
    cases = [("tiny", "fast", 4), ("1B", "fast", 4), ("8B", "fast", 4), ("1B", "best", 4), ("1B", "fast", 3)]
    table, figures = [], []
    for size, effort, bits in [*cases, ("8B", "best", 4)]:
        if size not in models:
            continue
        model = gpu_models.build(size)
        count, held = gpu_models.parameters(model), mx.get_active_memory()
        with mt.track_memory() as m:
            mt.quantize_model(model, bits, 64, method="optimal", effort=effort, progress=False)
            mx.eval(model.parameters())
        figures.append({"model": size, "effort": effort, "bits": bits, "held_bytes": held, **m.to_dict()})
        seconds = [f"{m.seconds:.2f}", f"{m.seconds / count * 1e6 * 1e3:.3f}"]
        table.append(note([size, effort, bits, *seconds, format_bytes(held), format_bytes(m.peak_bytes)]))
        del model
        release()
    columns = ["model", "effort", "bits", "seconds", "ms a million weights", "model before", "peak while quantizing"]
    print(render_table(columns, table))
    return {"quantizing": figures}


def kernels(models: tuple[str, ...]) -> dict[str, Any]:
    """Quantized against bf16 products, by mode and rows."""
    toy = models == ("tiny",)
    width, row_counts, repeats = (512, (1, 16), 5) if toy else (4096, (1, 16, 256, 4096), 50)
    weight = mx.random.normal((width, width)).astype(mx.bfloat16) * 0.02
    table, figures = [], []

    def timed(product: Callable[[mx.array], mx.array], x: mx.array) -> float:
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

        for rows in row_counts:
            x = mx.random.normal((rows, width)).astype(mx.bfloat16)
            mx.eval(x)
            whole, packed_seconds = timed(lambda x: x @ weight.T, x), timed(quantized, x)
            figures.append({"mode": mode, "bits": bits, "rows": rows, "bf16": whole, "quantized": packed_seconds})
            row.append(f"{whole / packed_seconds:.2f}")
        table.append(note(row))
    title = f"\nspeed of the quantized product over the bf16 one, {width} x {width}"
    print(render_table(["mode", "bits", *(f"{n} rows" for n in row_counts)], table, title=title))
    return {"kernels": figures}
