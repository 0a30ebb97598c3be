"""Errors of CUDA: the driver, its libraries, and operations that the backend lacks."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX, KnownError

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
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
    KnownError(
        "A quantized product that CUDA lacks",
        r"No implementation for problem shape|has no CUDA implementation|\[QMM\] NYI"
        r"|\d-bit quantization is not supported",
        "RuntimeError: [quantized_matmul] No implementation for problem shape: 2480x4096x128x1 activation: "
        'bfloat16, bits: 4, group size: 64, mode: "affine".',
        "The CUDA backend has no kernel for this product. The numbers are rows, outputs, inputs and batch. Its kernels "
        "need an input width that is a multiple of 64 and of the group size, which narrow layers do not have, and "
        "packed weights and scales that lie in order, which a transposed view does not. Metal and the processor take "
        "every shape.",
        (
            "uv pip install -U 'mlx[cuda13]'   # later versions take more shapes and modes",
            "Quantize with `mt.quantize_model`: it multiplies once with each kind of layer first, and leaves those "
            "unpacked that have no kernel here, or a wrong one.",
            "A model that is quantized already: `model, *_ = mlx_tune.lm.load(path)` unpacks such layers.",
            "If the width is a multiple of 64, put the arrays in order: `layer.weight = mx.contiguous(layer.weight)`, "
            "and its scales and biases alike.",
            "mlx-tune doctor --only quantized-kernels   # the shapes of common models, here",
        ),
        (
            "https://github.com/mflux-community/mflux/issues/563",
            MLX + "issues/2536",
            MLX + "issues/3122",
            MLX + "blob/main/mlx/backend/cuda/quantized/quantized.cpp",
        ),
    ),
    KnownError(
        "CUDA headers that are not found",
        r"Can not find locations of CUDA headers",
        "RuntimeError: Can not find locations of CUDA headers, please set environment variable CUDA_HOME or CUDA_PATH.",
        "MLX compiles some kernels while it runs, and needs the headers of the CUDA runtime and of CCCL for it,"
        " which its own packages do not always bring. Under pytest the process may die without this text.",
        (
            "uv pip install nvidia-cuda-runtime nvidia-cuda-cccl   # for cuda12 the names end in -cu12",
            "Or point to an installed toolkit: `export CUDA_HOME=/usr/local/cuda`.",
        ),
        (MLX + "issues/3859", MLX + "pull/2906", MLX + "blob/main/mlx/backend/cuda/jit_module.cpp"),
    ),
    KnownError(
        "An illegal memory access on CUDA",
        r"an illegal memory access was encountered|cudaErrorIllegalAddress",
        "RuntimeError: cudaMallocManaged failed: an illegal memory access was encountered.",
        "A kernel touched memory that is not there. CUDA reports it at a later call, so the call that the error"
        " names is not the one at fault. Memory that ran out has shown itself like this, too. The process "
        "cannot use the GPU again.",
        (
            "Start the process again, with a smaller batch or model first: `mt.autobatch(step, make_batch)` finds one.",
            "If it returns with memory free, find the call: `CUDA_LAUNCH_BLOCKING=1` in the environment.",
            "uv pip install -U 'mlx[cuda13]'",
        ),
        (MLX + "issues/2821",),
    ),
)
