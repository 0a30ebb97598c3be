"""Errors of installing and importing."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.known_error import MLX, KnownError

ENTRIES: tuple[KnownError, ...] = (
    KnownError(
        "MLX without a backend",
        r"libmlx\.(so|dylib): cannot open shared object file|Library not loaded: @rpath/libmlx",
        "ImportError: libmlx.so: cannot open shared object file: No such file or directory",
        "The package `mlx` is there, the one with the library is not: on Linux `pip install mlx` does not bring it.",
        # Where the library was taken away later, what is installed counts as complete: hence the force.
        ("uv pip install --force-reinstall 'mlx[cpu]'   # or mlx[cuda12], mlx[cuda13] with an NVIDIA GPU",),
        (MLX + "issues/2390", MLX + "issues/2402"),
    ),
    KnownError(
        "NVIDIA's libraries are missing",
        r"lib(nccl|cudnn|cublas|cublasLt|cudart|cufft|cusolver|nvrtc)[\w-]*\.so[\d.]*: cannot open",
        "ImportError: libnccl.so.2: cannot open shared object file: No such file or directory",
        "The CUDA backend is installed without the packages that bring NVIDIA's libraries, or on a machine that is "
        "meant to compute on its processor.",
        (
            "uv pip install --force-reinstall 'mlx[cuda12]'   # or mlx[cuda13]; without an NVIDIA GPU mlx[cpu]",
            "Of two backends that are installed, the last one is in force: `mlx-tune doctor --only one-backend`.",
        ),
        (MLX + "issues/2500", "https://ml-explore.github.io/mlx/build/html/install.html"),
    ),
    KnownError(
        "Another mlx_tune is in the way",
        r"cannot import name '\w+' from 'mlx_tune'|module 'mlx_tune' has no attribute",
        "AttributeError: module 'mlx_tune' has no attribute 'wired_limit'",
        "The package that was imported is not this library: the distribution `mlx-tune` is an unrelated trainer whose "
        "package has the same name, and the one that was installed last has overwritten the other.",
        (
            "uv pip uninstall mlx-tune && uv pip install --force-reinstall mlx-tune-kit",
            "If only one name is missing, this library is older than what you read: `uv pip install -U mlx-tune-kit`.",
        ),
        ("https://pypi.org/project/mlx-tune",),
    ),
    KnownError(
        "Another mlx is in the way",
        r"No module named 'mlx\.core'|'mlx' is not a package",
        "ModuleNotFoundError: No module named 'mlx.core'; 'mlx' is not a package",
        "A file `mlx.py` or a folder `mlx` of your own, beside the script, is imported instead of MLX.",
        ("Rename it; `python -c 'import mlx; print(mlx.__path__)'` says which it is.",),
        ("https://docs.python.org/3/tutorial/modules.html#the-module-search-path",),
    ),
    KnownError(
        "MLX and its backend do not match",
        r"undefined symbol: \S*mlx|Symbol not found: \S*mlx|core\..*\.so: undefined symbol",
        "ImportError: mlx/core.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3mlx4core9cumulativeE",
        "`mlx` and the distribution with its library (`mlx-cpu`, `mlx-cuda-12`, `mlx-metal`) are of different "
        "versions, or another `libmlx` (Homebrew's) is found first. `pip check` does not notice.",
        (
            "uv pip install --force-reinstall 'mlx[cpu]'   # or the extra that you use, so that both match",
            "brew uninstall mlx   # on a Mac where the error names Homebrew's libmlx",
        ),
        ("https://github.com/Acelogic/LTX-2-MLX/issues/16", MLX + "issues/2402"),
    ),
    KnownError(
        "glibc is too old",
        r"version `GLIBC(XX)?_[\d.]+' not found",
        "ImportError: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.35' not found (required by libmlx.so)",
        "The wheels are made for glibc 2.35 or later.",
        ("Use a newer distribution (Ubuntu 22.04, Debian 12), also as a container image.",),
        ("https://ml-explore.github.io/mlx/build/html/install.html",),
    ),
)
