"""Products of float32 matrices to float32's own precision, also where the device rounds factors to TF32.

CUDA, and newer Apple GPUs, round the factors of a float32 product to ten bits unless `MLX_ENABLE_TF32=0` was set before
MLX started. Sums of squares that are inverted, and errors that are compared, need more. A factor is the sum of its ten
leading bits and the rest, so that three products of such parts carry some twenty bits (Markidis et al., 2018,
https://arxiv.org/abs/1803.04014). Half-precision numbers fit into ten bits and need no second part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product

import mlx.core as mx

#: Bits of a float32 number that TF32 keeps: sign, exponent and ten of the mantissa.
_KEPT_BITS = 0xFFFFE000

#: Rows and columns of the product that is tried: large enough for a matrix kernel.
_TRIED = 128


def matmul_float32(a: mx.array, b: mx.array) -> mx.array:
    """`a @ b` in float32, whatever the device does to factors.

    Args:
        a: `[..., rows, inner]`, any float dtype.
        b: `[..., inner, columns]`, any float dtype.

    Returns:
        float32 `[..., rows, columns]`.

    Examples:
        >>> matmul_float32(mx.full((2, 2), 1 + 2**-12), mx.eye(2)).dtype
        mlx.core.float32
    """
    if not rounds_factors():
        return a.astype(mx.float32) @ b.astype(mx.float32)
    return product_of_parts(a, b, mx.matmul)


def arithmetic() -> str:
    """The arithmetic of float32 products here, in a sentence for reports that judge by them."""
    if not rounds_factors():
        return "Float32 products were computed to float32's precision."
    return (
        "MLX rounds the factors of float32 products to ten bits on this device (TF32): sums over inputs and the errors "
        "of outputs were computed in parts, to float32's precision; products within the model were rounded. Set "
        "MLX_ENABLE_TF32=0 before Python starts for none to be."
    )


def rounds_factors() -> bool:
    """True where MLX rounds the factors of float32 products on its default device. Tried once for each device."""
    return _rounds_factors(mx.default_device().type)


@functools.cache
def _rounds_factors(device: mx.DeviceType) -> bool:
    del device  # the cache's key
    fine = 1 + 2.0**-12
    return bool(((fine * mx.eye(_TRIED)) @ mx.eye(_TRIED)).max().item() != fine)


def product_of_parts(a: mx.array, b: mx.array, multiply: Callable[[mx.array, mx.array], mx.array]) -> mx.array:
    """The sum of the products of the factors' parts, but for that of both rests, which float32 does not hold.

    Args:
        a: The first factor.
        b: The second.
        multiply: Multiplies two float32 matrices, and may round their numbers to ten bits.
    """
    pairs = list(product(_parts(a), _parts(b)))[:3]
    terms = [multiply(x, y) for x, y in reversed(pairs)]  # small ones first
    return functools.reduce(mx.add, terms)


def _parts(x: mx.array) -> list[mx.array]:
    wide = x.astype(mx.float32)
    if x.dtype in (mx.bfloat16, mx.float16):
        return [wide]
    leading = mx.bitwise_and(wide.view(mx.uint32), mx.array(_KEPT_BITS, dtype=mx.uint32)).view(mx.float32)
    # Of an infinity there is no rest.
    return [leading, mx.where(mx.isfinite(wide), wide - leading, 0)]
