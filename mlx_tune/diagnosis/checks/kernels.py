"""A check of products with packed weights, in the shapes of common models."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from mlx_tune.diagnosis.check import Finding, check, passed, warned
from mlx_tune.diagnosis.checks.compute import THEME

if TYPE_CHECKING:
    from mlx_tune.quantization.planning.kernels import Use

#: Use of the weights, their shape, and their format: (bits, group size, mode).
Shape: TypeAlias = "tuple[Use, tuple[int, ...], tuple[int, int, str]]"

_FOUR, _EIGHT = (4, 64, "affine"), (8, 64, "affine")

#: Narrow layers (time and position embedders, adapters of images), then layers of language models.
SHAPES: tuple[Shape, ...] = (
    ("product", (256, 64), _FOUR),
    ("product", (4864, 896), _FOUR),  # Qwen2.5 0.5B
    ("product", (8192, 2048), _FOUR),  # Llama 3.2 1B
    ("product", (14336, 4096), _FOUR),  # Llama 3.1 8B
    ("product", (14336, 4096), _EIGHT),
    ("gathered", (128, 768, 2048), _FOUR),  # Qwen3 30B-A3B
    ("gathered", (32, 2880, 2880), (4, 32, "mxfp4")),  # gpt-oss 20B
    ("lookup", (128256, 2048), _FOUR),
)


@check(
    "quantized-kernels",
    THEME,
    remedies={
        "unpack": "model, *_ = mlx_tune.lm.load(PATH)   # unpacks such layers; quantize_model leaves them unpacked",
    },
    in_child=True,
    compiles=True,
)
def quantized_kernels(shapes: tuple[Shape, ...] = SHAPES) -> Finding:
    """Products with packed weights are right, in the shapes of common models.

    Each is multiplied at one row and at eight with made-up weights, and compared with the dequantized product. A shape
    for which a backend's kernel is wrong gives wrong answers without an error; one without a kernel raises "No
    implementation for problem shape" when the model is used. Known faults are on the page about faults upstream. On
    CUDA each kernel is compiled when it is first used, half a minute each; MLX keeps it on disk for the next time.
    """
    from mlx_tune.quantization.formats.modes import Format
    from mlx_tune.quantization.planning.kernel_trials import default_backend, fault_in
    from mlx_tune.quantization.planning.kernels import combinations

    found = [
        fault_in(tried)
        for use, shape, wanted in shapes
        for tried in combinations([use], shape, Format(*wanted), "bfloat16", default_backend())
    ]
    faults = [fault for fault in found if fault is not None]
    figures = {"tried": len(found), "faults": [str(fault) for fault in faults]}
    if not faults:
        return passed(f"{len(found)} kinds of packed weights, as common models have them, come out right",
                      figures=figures)  # fmt: skip
    more = f", and {len(faults) - 1} more of {len(found)}" if len(faults) > 1 else ""
    return warned(f"{faults[0]}{more}", "unpack", figures=figures)
