"""The classic steps of checking an installation, as measurements that show what the words mean on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

from mlx_tune import devices
from mlx_tune.diagnosis.check import Finding, check, passed, skipped, warned
from mlx_tune.measuring.interleaved_timing import compare
from mlx_tune.measuring.step import StepTrial, run_step
from mlx_tune.memory import track_memory
from mlx_tune.units import format_bytes, format_percent, format_seconds
from mlx_tune.wiring.context import wired_limit
from mlx_tune.wiring.limits import read_capacity

THEME = "bench"


def _timed(work: Callable[[], object], repeats: int = 5) -> float:
    """The best time of `work`, whose arrays are evaluated, after one run to warm up."""
    import mlx.core as mx

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mx.eval(work())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _on_gpu() -> bool:
    return devices.backend() != "cpu"


@check("lazy", THEME, in_child=True, bench=True)
def lazy(size: int | None = None, operations: int = 100) -> Finding:
    """Lazy evaluation: an operation builds a graph, `mx.eval` computes it.

    Building costs microseconds and no memory. `print`, `.item()` and conversions to NumPy evaluate too.
    """
    import mlx.core as mx

    size = size or (2048 if _on_gpu() else 256)
    x = mx.random.normal((size, size)) / size**0.5
    mx.eval(x)
    with track_memory() as memory:
        before = mx.get_active_memory()
        start = time.perf_counter()
        y = x
        for _ in range(operations):
            y = mx.tanh(y @ x)
        built = time.perf_counter() - start
        grown = mx.get_active_memory()
        start = time.perf_counter()
        mx.eval(y)
        evaluated = time.perf_counter() - start
    return passed(
        f"{2 * operations} operations on {size} x {size}: graph built in {format_seconds(built)}, evaluated in "
        f"{format_seconds(evaluated)} ({evaluated / built:.0f} times as long)",
        figures={
            "built_seconds": built,
            "evaluated_seconds": evaluated,
            "operations": 2 * operations,
            "peak_bytes": memory.peak_bytes,
            "active_bytes_after_building": grown,
            "grown_bytes_by_building": grown - before,
            "array_bytes": x.nbytes,
        },
    )


@check("unified-memory", THEME, in_child=True, bench=True)
def unified_memory(size: int | None = None) -> Finding:
    """Unified memory: the processor and the GPU work on the same array, and nobody copies it.

    There is no `.to(device)`: a stream or device is given to the operation, not to the array. On CUDA the data moves
    behind the scenes; the CPU backend has one device.
    """
    import mlx.core as mx

    kind = devices.backend()
    size = size or (4096 if kind != "cpu" else 512)
    x = mx.random.normal((size, size))
    mx.eval(x)
    second = mx.gpu if kind != "cpu" else mx.cpu
    before = mx.get_active_memory()
    with track_memory() as memory:
        mx.eval(mx.sum(x, stream=mx.cpu), mx.max(x, stream=second))
    grown = memory.peak_bytes - before
    figures = {"seconds": memory.seconds, "grown_bytes": grown, "array_bytes": x.nbytes}
    figures["readers"] = 1 if kind == "cpu" else 2
    by, remark = {
        "metal": ("the processor and the GPU", "nobody copied it"),
        "cuda": ("the processor and the GPU", "on CUDA it is moved over and back behind the scenes"),
        "cpu": ("two operations", "the CPU backend has one device, so there is nothing to share"),
    }[kind]
    text = f"an array of {format_bytes(x.nbytes)} read by {by} in {format_seconds(memory.seconds)}"
    return passed(f"{text}, with at most {format_bytes(grown)} more in use: {remark}", figures=figures)


@check("matmul", THEME, in_child=True, bench=True)
def matmul(size: int | None = None) -> Finding:
    """Matrix multiplication on the default device, in 32 and 16 bits."""
    import mlx.core as mx

    size = size or (4096 if _on_gpu() else 512)
    rates = {}
    for name, dtype in (("float32", mx.float32), ("bfloat16", mx.bfloat16)):
        left, right = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
        mx.eval(left, right)
        rates[name] = 2 * size**3 / _timed(lambda: left @ right, 3) / 1e12  # noqa: B023 - called at once
    text = ", ".join(f"{name} {_rate(rate)}" for name, rate in rates.items())
    return passed(f"{size} x {size}: {text}", figures={"teraflops": rates, "size": size})


def _rate(teraflops: float) -> str:
    return f"{teraflops:.1f} TFLOP/s" if teraflops >= 1 else f"{1000 * teraflops:.3g} GFLOP/s"


@check("quantized-matmul", THEME, in_child=True, bench=True)
def quantized_matmul(size: int | None = None, tokens: int = 64) -> Finding:
    """Quantized against full-precision matmul, for one token and for many.

    Quantized weights are read faster, which is what decides for one token on Apple GPUs. For many tokens, on the
    processor and on some NVIDIA GPUs they are slower: quantize there to fit, not to be fast.
    """
    import mlx.core as mx

    size = size or (4096 if _on_gpu() else 1024)
    weight = mx.random.normal((size, size)).astype(mx.bfloat16 if _on_gpu() else mx.float32)
    packed = mx.quantize(weight, 64, 4)
    mx.eval(weight, packed)
    ratios = {}
    for rows in (1, tokens):
        x = mx.random.normal((rows, size)).astype(weight.dtype)
        mx.eval(x)
        full = _timed(lambda: x @ weight.T)  # noqa: B023 - called at once
        quantized = _timed(lambda: mx.quantized_matmul(x, *packed, group_size=64, bits=4))  # noqa: B023
        ratios[rows] = full / quantized
    said = [f"{ratio:.2g} times the speed for {rows} token{'s' if rows > 1 else ''}" for rows, ratio in ratios.items()]
    name = "bfloat16" if _on_gpu() else "float32"
    saved = 1 - sum(array.nbytes for array in packed) / weight.nbytes
    text = f"4 bits against {name}, {size} x {size}: {', '.join(said)}, {format_percent(saved, 0)} smaller"
    return passed(text, figures={"speed_ratio": {str(n): ratio for n, ratio in ratios.items()}, "saved_share": saved})


@check("checkpointed-step", THEME, in_child=True, bench=True)
def checkpointed_step(blocks: int = 8, width: int | None = None, rows: int | None = None) -> Finding:
    """A training step with checkpointed blocks against the plain one: memory saved, time added.

    Both run with dispatch held back as far as it goes, since a limit is what keeps MLX from running ahead and
    filling the memory that checkpointing freed.
    """
    import mlx.core as mx
    import mlx.nn as nn

    from mlx_tune.checkpointing.block.wrap import checkpoint

    width = width or (1024 if _on_gpu() else 128)
    rows = rows or (8192 if _on_gpu() else 1024)

    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    model = nn.Sequential(*(block() for _ in range(blocks)))
    x = mx.random.normal((rows, width))
    mx.eval(model.parameters(), x)
    gradient = nn.value_and_grad(model, lambda inputs: mx.square(model(inputs)).mean())

    def best() -> StepTrial:
        trials = [run_step(gradient, [x], limit_bytes=1) for _ in range(3)]
        return StepTrial(1, min(t.peak_bytes for t in trials), min(t.seconds for t in trials))

    plain = best()
    for layer in model.layers:
        checkpoint(layer)
    checkpointed = best()
    saved, added = 1 - checkpointed.peak_bytes / plain.peak_bytes, checkpointed.seconds / plain.seconds - 1
    text = (
        f"{blocks} blocks: peak {format_bytes(plain.peak_bytes)} plain, {format_bytes(checkpointed.peak_bytes)} "
        f"checkpointed ({format_percent(saved, 0)} less), time {format_seconds(plain.seconds)} and "
        f"{format_seconds(checkpointed.seconds)} ({format_percent(added, 0)} more)"
    )
    figures = {"plain": plain.to_dict(), "checkpointed": checkpointed.to_dict()}
    return passed(text, figures=figures) if saved > 0 else warned(text, figures=figures)


@check("wired", THEME, in_child=True, bench=True)
def wired(total_bytes: int | None = None, idle_seconds: float = 1.0, turns: int = 6) -> Finding:
    """Gain of wiring on this machine: a sweep through weights the size of a model, with and without.

    Each sweep multiplies one row with every matrix after a second of rest, as answering a question does: that is
    when macOS may have taken memory away. The weights are three quarters of what may be wired, or less where less is
    free: close what holds memory before you believe it. A machine with memory to spare gains nothing. No more is
    wired than other processes of this library that share leave.
    """
    import mlx.core as mx

    capacity = read_capacity()
    if capacity.reason:
        return skipped(f"no gain on this machine: {capacity.reason}", figures={"gain": 0.0})
    total = most_to_wire(0.75, 0.7) if total_bytes is None else total_bytes
    width = 4096 if total > 2**30 else 256
    weights = []
    for _ in range(max(1, total // (2 * width * width))):
        weights.append(mx.random.normal((width, width)).astype(mx.float16) / width**0.5)
        mx.eval(weights[-1])  # one at a time: what makes them must not pile up beside them
    mx.clear_cache()

    def sweep() -> float:
        time.sleep(idle_seconds)
        x = mx.ones((1, width), dtype=mx.float16)
        start = time.perf_counter()
        for weight in weights:
            x = x @ weight
        mx.eval(x)
        return time.perf_counter() - start

    held = sum(weight.nbytes for weight in weights)
    cut = ""

    def sweep_wired() -> float:
        nonlocal cut
        with wired_limit(weights, headroom="10%", share=True) as wired:
            cut = cut or (wired.reason if wired.limit_bytes < held else "")
            return sweep()

    sweep()
    compared = compare(sweep_wired, sweep, threshold=1.02, most_turns=turns)
    if cut:
        return skipped(f"not all of it could be wired: {cut}")
    gain = compared.ratio - 1
    size = f"{format_bytes(held)} ({format_percent(held / capacity.cap_bytes, 0)} of what may be wired)"
    figures = {"gain": gain, "uncertainty": compared.uncertainty, "bytes": total, "turns": compared.turns}
    if gain < 0.02 or gain < 2 * compared.uncertainty:
        return passed(
            f"no gain on this machine: wiring {size} changed the time of a sweep by {format_percent(-gain)} "
            f"± {format_percent(2 * compared.uncertainty)}",
            figures=figures,
        )
    return passed(f"wiring {size} makes a sweep {compared.ratio:.2f} times as fast", figures=figures)


def most_to_wire(of_cap: float, of_free: float) -> int:
    """The bytes that a measurement may wire: a share of what this machine may wire, and of what is free now."""
    free = min(room.bytes for room in devices.free_rooms())
    return min(int(of_cap * read_capacity().cap_bytes), int(of_free * free))
