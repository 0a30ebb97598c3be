"""Measuring products with packed weights beside those in bfloat16, by rows."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from mlx_tune.bench.sizes import Sizes, require
from mlx_tune.measuring.interleaved_timing import compare
from mlx_tune.measuring.step_outcome import first_line
from mlx_tune.presentation.plain import Json
from mlx_tune.quantization.formats.modes import Format

#: Formats that are compared: the usual ones.
_FORMATS = (Format(4, 64), Format(8, 64), Format(4, 32, "mxfp4"))


def products(sizes: Sizes, room: int) -> dict[str, Json]:
    """The speed of each format over that of the bfloat16 product, by rows, in turns; and its bytes.

    Args:
        sizes: Width of the square weights, rows, and repeats that are evaluated at a time.
        room: The bytes that it may take.
    """
    width, repeats = sizes.product_width, sizes.product_repeats
    # The weights in float32 while they are made and in bfloat16, packed ones, and the results that pile up.
    require(8 * width * width + 4 * repeats * width * max(sizes.product_rows), room)
    weight = (mx.random.normal((width, width)) * 0.02).astype(mx.bfloat16)
    mx.eval(weight)
    formats: dict[str, Json] = {}
    for wanted in _FORMATS:
        packed = mx.quantize(weight, **wanted.keywords())
        mx.eval(packed)
        by_rows: dict[str, Json] = {}
        for rows in sizes.product_rows:
            by_rows[str(rows)] = _speed(weight, packed, wanted, rows, repeats, sizes.turns)
        size = sum(array.nbytes for array in packed)
        formats[str(wanted)] = {"speed": by_rows, "bytes": size, "share_of_bfloat16": size / weight.nbytes}
    return {"width": width, "formats": formats}


def _speed(
    weight: mx.array, packed: tuple[mx.array, ...], wanted: Format, rows: int, repeats: int, turns: int
) -> dict[str, Json]:
    """The ratio and its standard error, or MLX's own words where it has no kernel."""
    scales, biases = packed[1], packed[2] if len(packed) > 2 else None
    inputs = [mx.random.normal((rows, weight.shape[1])).astype(mx.bfloat16) for _ in range(repeats)]
    mx.eval(inputs)

    def timed(product: Callable[[mx.array], mx.array]) -> float:
        started = time.perf_counter()
        mx.eval([product(x) for x in inputs])
        mx.synchronize()
        return time.perf_counter() - started

    def plain() -> float:
        return timed(lambda x: x @ weight.T)

    def quantized() -> float:
        return timed(lambda x: mx.quantized_matmul(x, packed[0], scales, biases, **wanted.keywords()))

    try:
        plain(), quantized()  # kernels are made
        compared = compare(quantized, plain, threshold=1.0, most_turns=max(3, turns))
    except (RuntimeError, ValueError) as missing:
        return {"ratio": None, "uncertainty": None, "missing": first_line(missing)}
    return {"ratio": compared.ratio, "uncertainty": compared.uncertainty, "missing": None}
