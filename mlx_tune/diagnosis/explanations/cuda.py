"""Errors of CUDA: the driver, its libraries, and operations that the backend lacks."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.entry import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "The CUDA driver is missing or too old",
        r"libcuda\.so\.1: cannot open|CUDA driver version is insufficient|cudaErrorInsufficientDriver"
        r"|no kernel image is available|unsupported toolchain|no CUDA-capable device",
        "cudaGetDeviceCount failed: CUDA driver version is insufficient for CUDA runtime version",
        "The backend needs an NVIDIA driver of at least 550.54.14 (cuda12) or 580 (cuda13), and a GPU of compute "
        "capability 7.5 or higher.",
        (
            "Update the driver, or take the other extra: `uv pip install 'mlx[cuda12]'`.",
            "See that `CUDA_VISIBLE_DEVICES` does not hide the GPU: `unset CUDA_VISIBLE_DEVICES`.",
            "Without a GPU: `uv pip install 'mlx[cpu]'`.",
        ),
        ("https://ml-explore.github.io/mlx/build/html/install.html",),
    ),
)
