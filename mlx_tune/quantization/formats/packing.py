"""MLX's packed affine format: codes in `uint32` words, a scale and a bias for each group of columns.

The codes of a row form one little-endian stream of bits, so 32 of them fill exactly `bits` words, whether or
not `bits` divides 32.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_tune.devices import backend
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.modes import AFFINE_BITS, AFFINE_GROUP_SIZES

#: Packed weights, scales, and biases where the mode has them.
PackedArrays = tuple[mx.array, mx.array, mx.array | None]


def check_affine(shape: tuple[int, ...], bits: int, group_size: int) -> None:
    """Raise unless a weight of this shape can be stored with these bits and this group size.

    Args:
        shape: The weight's, `[..., rows, columns]`.
        bits: Bits of a code.
        group_size: Columns that share a scale and a bias.

    Raises:
        QuantizationError: The bits or the group size are not ones that MLX has, the weight is not at least a
            matrix, or its columns are no multiple of the group size.

    Examples:
        >>> check_affine((8, 128), bits=4, group_size=64)
    """
    if bits not in AFFINE_BITS:
        raise QuantizationError(f"bits={bits}: affine quantization has {_either(AFFINE_BITS)}.")
    if group_size not in AFFINE_GROUP_SIZES:
        raise QuantizationError(f"group_size={group_size}: affine quantization has {_either(AFFINE_GROUP_SIZES)}.")
    if len(shape) < 2:
        raise QuantizationError(f"A weight of shape {list(shape)} has no rows: pass [rows, columns] or more axes.")
    if shape[-1] % group_size:
        fitting = [size for size in AFFINE_GROUP_SIZES if shape[-1] % size == 0]
        way_out = f"group_size={fitting[-1]} would do" if fitting else "no group size divides it"
        raise QuantizationError(
            f"A weight of shape {list(shape)} has {shape[-1]} columns, not divisible by "
            f"group_size={group_size}: {way_out}."
        )


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes as `mx.quantize` does.

    Args:
        codes: Whole numbers below `2**bits`, of any dtype, `[..., columns]`; the columns are a multiple of 32.
        bits: Bits of a code.

    Returns:
        `uint32` words, `[..., columns * bits / 32]`.

    Examples:
        >>> pack(mx.array([[1] + [0] * 30 + [15]]), bits=4).tolist()
        [[1, 0, 0, 4026531840]]
    """
    *lead, columns = codes.shape
    values = codes.astype(mx.uint32).reshape(*lead, columns // 32, 32)
    starts = [k * bits for k in range(32)]
    shifted = mx.left_shift(values, mx.array([start % 32 for start in starts], dtype=mx.uint32))
    words = []
    for j in range(bits):
        # The bits of different codes do not overlap, so adding is as good as an or, and it reduces along an axis.
        word = shifted[..., -(-32 * j // bits) : -(-32 * (j + 1) // bits)].sum(-1)
        if 32 * j % bits:
            straddling = 32 * j // bits  # this code starts in the word before: its upper bits are ours
            word = word + mx.right_shift(values[..., straddling], mx.array(32 * j - starts[straddling], mx.uint32))
        words.append(word)
    return mx.stack(words, -1).reshape(*lead, columns * bits // 32)


def unpack(packed: mx.array, bits: int) -> mx.array:
    """The codes in packed words: the inverse of `pack`.

    Args:
        packed: `uint32`, `[..., columns * bits / 32]`.
        bits: Bits of a code.

    Returns:
        `uint32` codes, `[..., columns]`.

    Examples:
        >>> codes = mx.arange(64).reshape(2, 32) % 8
        >>> mx.array_equal(unpack(pack(codes, bits=3), bits=3), codes).item()
        True
    """
    *lead, words = packed.shape
    blocks = packed.reshape(*lead, words // bits, bits)
    starts = [k * bits for k in range(32)]
    lower = mx.take(blocks, mx.array([start // 32 for start in starts]), axis=-1)
    codes = mx.right_shift(lower, mx.array([start % 32 for start in starts], dtype=mx.uint32))
    if 32 % bits:
        upper = mx.take(blocks, mx.array([min((start + bits - 1) // 32, bits - 1) for start in starts]), axis=-1)
        room = [32 - start % 32 for start in starts]  # bits of the code that the lower word still holds
        # Shifting by the word's width is undefined, so codes that do not straddle take a masked detour.
        high = mx.left_shift(upper, mx.array([min(r, 31) for r in room], dtype=mx.uint32))
        codes = mx.where(mx.array([r < bits for r in room]), codes + high, codes)
    return mx.bitwise_and(codes, mx.array(2**bits - 1, dtype=mx.uint32)).reshape(*lead, words * 32 // bits)


def dequantize_float32(
    packed: mx.array, scales: mx.array, biases: mx.array | None, bits: int, group_size: int, mode: str = "affine"
) -> mx.array:
    """The weight that stored codes, scales and biases stand for, worked out in float32.

    In the scales' own bfloat16 the product and the sum would be rounded once more, which is an error of the
    arithmetic and not of the quantization.

    Args:
        packed: `uint32` words, `[..., rows, columns * bits / 32]`.
        scales: `[..., rows, columns / group_size]`, any float dtype, or bytes in modes other than "affine".
        biases: As `scales`; None in modes that have none.
        bits: Bits of a code.
        group_size: Columns that share a scale.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".

    Returns:
        float32, `[..., rows, columns]`.

    Examples:
        >>> w = mx.random.normal((4, 64), dtype=mx.bfloat16)
        >>> after = dequantize_float32(*mx.quantize(w, bits=8, group_size=32), bits=8, group_size=32)
        >>> after.shape, after.dtype
        ((4, 64), mlx.core.float32)
    """
    if mode == "affine":
        scales = scales.astype(mx.float32)
        biases = None if biases is None else biases.astype(mx.float32)
    return mx.dequantize(
        packed, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32, stream=_stream_of(bits)
    )


def quantize_nearest(
    weight: mx.array, group_size: int, bits: int, mode: str = "affine"
) -> tuple[mx.array, mx.array, mx.array | None]:
    """`mx.quantize`, on a device that has the format.

    Args:
        weight: `[..., rows, columns]`.
        group_size: Columns that share a scale.
        bits: Bits of a code.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".

    Returns:
        Packed codes, scales, and biases or None in modes that have none.

    Examples:
        >>> quantize_nearest(mx.ones((2, 64)), 64, 4)[0].shape
        (2, 8)
    """
    packed, scales, *biases = mx.quantize(weight, group_size, bits, mode=mode, stream=_stream_of(bits))
    return packed, scales, biases[0] if biases else None


def _stream_of(bits: int) -> mx.Device | None:
    """The device that packs and unpacks: CUDA gives garbage at 1 bit, where it has no kernels (docs/upstream.md)."""
    return mx.Device(mx.cpu) if bits == 1 and backend() == "cuda" else None


def _either(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} and {values[-1]}"
