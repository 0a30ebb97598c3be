"""The fault that MLX has on a Hopper GPU, planted on any device: `PYTHONPATH=tests pytest -p hopper_faults TESTS`.

There `mx.quantized_matmul` returns noise where a row of weights is one group (docs/upstream.md). Tests that are not
about this pass all the same: their layers are wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

#: The arguments of `mx.quantized_matmul` after the first three, in order, and their defaults.
_DEFAULTS = {"biases": None, "transpose": True, "group_size": None, "bits": None, "mode": "affine"}


def pytest_configure() -> None:
    """Plant the fault before any test imports the library's own reference to the function."""
    mx.quantized_matmul = spoiled(mx.quantized_matmul)


def spoiled(honest: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The function as it is on a Hopper GPU.

    Args:
        honest: As `mx.quantized_matmul`.
    """

    def multiply(x: mx.array, w: mx.array, scales: mx.array, *rest: Any, **named: Any) -> mx.array:
        result = honest(x, w, scales, *rest, **named)
        given = _DEFAULTS | dict(zip(_DEFAULTS, rest, strict=False)) | named
        one_group = x.shape[-1] == (given["group_size"] or 64)
        format_hit = given["mode"] == "affine" and (given["bits"] or 4) in (4, 8)
        rows_hit = math.prod(x.shape[:-1]) > 1 and x.shape[-2] > 1
        if not (one_group and format_hit and rows_hit and given["transpose"]):
            return result
        return 3 * mx.random.normal(result.shape, key=mx.random.key(5)).astype(result.dtype)

    return multiply
