"""Checks that compute: whether kernels give the right numbers, where they run, and which BLAS they use."""

from __future__ import annotations

import glob
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_tune import devices
from mlx_tune.diagnosis.check import Finding, check, failed, passed, skipped, warned
from mlx_tune.diagnosis.checks import distributions

THEME = "compute"

#: Names of libraries that multiply matrices well, as they appear in a process's memory map.
_FAST_BLAS = ("openblas", "mkl_rt", "libblis", "armpl", "nvpl_blas", "flexiblas", "Accelerate")
_PLACES = (
    "/usr/lib/*/openblas-*/libopenblas.so.0",
    "/usr/lib/*/libopenblas.so.0",
    "/usr/lib64/libopenblasp.so.0",  # Fedora names the one with threads so; its libopenblas64 counts in 64 bits
    "/usr/lib64/libopenblas.so.0",
    "/usr/lib/libopenblas.so.0",
    "/usr/lib/*/blis-*/libblis.so.4",
)

#: An operation to try: its name, how MLX does it, how NumPy does it in float64, and the relative error to allow.
Operation = tuple[str, Callable[..., Any], Callable[..., Any], float]


def _operations() -> list[Operation]:
    import mlx.core as mx
    import numpy as np

    def softmax(a: Any) -> object:
        e = np.exp(a - a.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def quantized(a: Any, b: Any) -> object:
        return mx.quantized_matmul(a, *mx.quantize(b, 64, 8), group_size=64, bits=8)

    # TF32, which MLX uses for float32 on CUDA, keeps ten bits of a factor.
    return [
        ("matmul", lambda a, b: a @ b.T, lambda a, b: a @ b.T, 5e-3),
        ("matmul in 16 bits", lambda a, b: a.astype(mx.float16) @ b.T.astype(mx.float16), lambda a, b: a @ b.T, 1e-2),
        ("quantized matmul", quantized, lambda a, b: a @ b.T, 2e-2),
        ("softmax", lambda a, b: mx.softmax(a, axis=-1), lambda a, b: softmax(a), 1e-4),
        ("sort", lambda a, b: mx.sort(a, axis=-1), lambda a, b: np.sort(a, -1), 0.0),
        ("sum", lambda a, b: (a * b).sum(axis=-1), lambda a, b: (a * b).sum(-1), 1e-4),
        ("gather", lambda a, b: a[mx.array([3, 1, 60])], lambda a, b: a[[3, 1, 60]], 0.0),
    ]


def _kernels(device: Any, operations: Sequence[Operation] | None) -> Finding:
    import mlx.core as mx
    import numpy as np

    draw = np.random.default_rng(0)
    left, right = (draw.standard_normal((64, 128)).astype(np.float32) for _ in range(2))
    wrong, names = [], []
    with mx.stream(device):
        for name, ours, reference, tolerance in _operations() if operations is None else operations:
            result = ours(mx.array(left), mx.array(right)).astype(mx.float32)
            mx.eval(result)
            wanted = reference(left.astype(np.float64), right.astype(np.float64))
            error = float(np.abs(np.array(result, dtype=np.float64) - wanted).max() / np.abs(wanted).max())
            names.append(name)
            if not error <= tolerance:  # NaN is wrong too
                wrong.append(f"{name} is off by {error:.2g} of the largest value")
    if wrong:
        again = distributions.with_backend(distributions.installed())
        return failed("; ".join(wrong), "again", again, figures={"wrong": wrong})
    return passed(f"{', '.join(names)} give the right numbers")


_REINSTALL = {"again": f"{distributions.AGAIN}   # then update the driver or macOS, and report it"}


@check("kernel-cpu", THEME, remedies=_REINSTALL, in_child=True)
def kernel_cpu(operations: Sequence[Operation] | None = None) -> Finding:
    """Operations on the processor give the right numbers.

    Small results are compared with NumPy's in double precision: that something is computed at all does not say that
    it is right.
    """
    import mlx.core as mx

    return _kernels(mx.cpu, operations)


@check("kernel-gpu", THEME, remedies=_REINSTALL, in_child=True)
def kernel_gpu(operations: Sequence[Operation] | None = None, count: int | None = None) -> Finding:
    """Operations on the GPU give the right numbers.

    A driver, a beta of macOS or a kernel that was compiled for another chip can give wrong ones without an error.
    """
    import mlx.core as mx

    here = devices.gpu_count()
    if not (here if count is None else count):
        return skipped("this MLX has no GPU backend, or sees no GPU")
    return _kernels(mx.gpu if here else mx.cpu, operations)


@check(
    "default-device",
    THEME,
    remedies={"gpu": "mx.set_default_device(mx.gpu)   # and find what set the CPU: a sitecustomize, a profile"},
    in_child=True,
)
def default_device(default: str | None = None, gpu: bool | None = None) -> Finding:
    """Work goes to the GPU where there is one.

    An array has no device (`array.device` does not exist): operations have one, the default device or the stream
    that they are given.
    """
    import mlx.core as mx

    if default is None:
        default = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    gpu = devices.gpu_count() > 0 if gpu is None else gpu
    if gpu and default == "cpu":
        return warned("there is a GPU, but the default device is the CPU", "gpu")
    return passed(f"the default device is the {default.upper()}")


@check(
    "blas",
    THEME,
    remedies={
        "OpenBLAS is there": "export LD_PRELOAD={library}",
        "no OpenBLAS": "sudo apt install libopenblas0-pthread && "
        "export LD_PRELOAD=/usr/lib/$(uname -m)-linux-gnu/openblas-pthread/libopenblas.so.0",
    },
    in_child=True,
)
def blas(
    rate: float | None = None,
    loaded: Sequence[str] | None = None,
    libraries: Sequence[str] | None = None,
    measure: Callable[[str], float | None] | None = None,
    system: str | None = None,
) -> Finding:
    """On Linux, the CPU backend multiplies matrices with a fast BLAS.

    The wheel brings the reference BLAS, which is tens of times slower than OpenBLAS. Preloading OpenBLAS replaces
    it; nothing has to be built.
    """
    import mlx.core as mx

    system = platform.system() if system is None else system
    if system != "Linux":
        return skipped("only the Linux wheel brings a BLAS of its own")
    if loaded is None and mx.cuda.is_available():
        return skipped("work goes to the GPU")
    measure = measure or _gflops_with
    loaded = _loaded_libraries() if loaded is None else loaded
    fast = [name for name in loaded if _is_fast(name)]
    before = matmul_gflops() if rate is None else rate
    if fast:
        return passed(f"{Path(fast[0]).name}, {before:.0f} GFLOP/s", figures={"gflops": before})
    libraries = [path for place in _PLACES for path in sorted(glob.glob(place))] if libraries is None else libraries
    library, after = next(((one, reached) for one in libraries if (reached := measure(one)) is not None), ("", 0.0))
    if not library:
        why = f"{Path(libraries[0]).name} cannot be preloaded" if libraries else "OpenBLAS is not installed"
        text = f"the reference BLAS, {before:.1f} GFLOP/s; {why}"
        return warned(text, "no OpenBLAS", figures={"gflops": before})
    figures = {"gflops": before, "preloaded": after}
    if after < 1.5 * before:
        return passed(f"{before:.0f} GFLOP/s, {after:.0f} with {Path(library).name}", figures=figures)
    text = f"the reference BLAS: {before:.1f} GFLOP/s, {after:.0f} with {Path(library).name}"
    return warned(text, "OpenBLAS is there", {"library": library}, figures=figures)


def _is_fast(path: str) -> bool:
    # SciPy's and NumPy's wheels bring an OpenBLAS whose symbols have another name: MLX does not use it.
    return "scipy_openblas" not in path and any(name in path for name in _FAST_BLAS)


def _loaded_libraries() -> list[str]:
    import mlx.core as mx

    mx.eval(mx.ones((2, 2)) @ mx.ones((2, 2)))
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    return sorted({line.split()[-1] for line in maps.read_text().splitlines() if "/" in line})


def matmul_gflops(size: int = 640) -> float:
    """Measure float32 matmul on the processor: the best of three, in GFLOP/s."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        left, right = mx.ones((size, size)), mx.ones((size, size))
        mx.eval(left, right, mx.ones((64, 64)) @ mx.ones((64, 64)))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            mx.eval(left @ right)
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def _gflops_with(library: str) -> float | None:
    """The rate of matmul with a library preloaded; None where MLX does not start with it."""
    code = "from mlx_tune.diagnosis.checks.compute import matmul_gflops; print(matmul_gflops())"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LD_PRELOAD": library},
        check=False,
    )
    return float(ended.stdout.split()[-1]) if ended.returncode == 0 else None
