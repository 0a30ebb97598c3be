"""The packed formats that MLX has: which bits and group sizes go with which mode, and how many bytes each takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mlx_tune.errors import QuantizationError
from mlx_tune.units import whole_number

#: The length of a search.
Effort = Literal["fast", "best"]

#: What `mx.quantize` takes in mode "affine".
AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)

#: Modes whose group size and bits are fixed: (group size, bits).
FIXED_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
MODES = ("affine", *FIXED_MODES)

#: Modes in which MLX can quantize a layer's inputs as well.
ACTIVATION_MODES = ("nvfp4", "mxfp8")

#: Size of an element of each dtype that can be quantized, and that scales can have.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

#: What `quantize_model` uses where nothing is said.
DEFAULT_BITS, DEFAULT_GROUP_SIZE = 4, 64


@dataclass(frozen=True)
class Format:
    """The storage format of a layer's weights.

    Attributes:
        bits: Bits of one code.
        group_size: Consecutive weights of a row that share a scale.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        quantize_input: True where the layer quantizes its inputs too.
        scale_dtype: Of affine scales and biases, where it is not that of the weights.
    """

    bits: int
    group_size: int
    mode: str = "affine"
    quantize_input: bool = False
    scale_dtype: str | None = None

    def __str__(self) -> str:
        """Short text for tables."""
        name = f"{self.bits} bits, group {self.group_size}" if self.mode == "affine" else self.mode
        name += f", {self.scale_dtype} scales" if self.scale_dtype else ""
        return f"{name}, inputs too" if self.quantize_input else name

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments for MLX's functions on packed arrays."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def nbytes(self, weights: int, item_bytes: int) -> int:
        """Bytes of that many packed weights, their scales and, in affine mode, biases.

        Args:
            weights: The number; a multiple of the group size.
            item_bytes: Size of an element of the weight's own dtype, which affine scales and biases keep unless
                `scale_dtype` is given.
        """
        item_bytes = ITEM_BYTES[self.scale_dtype] if self.scale_dtype else item_bytes
        groups = weights // self.group_size
        return weights * self.bits // 8 + groups * (2 * item_bytes if self.mode == "affine" else 1)


def check_format(bits: object, group_size: object, mode: object, *, where: str = "") -> Format:
    """Make a format out of arguments, or say what is wrong with them.

    In a mode that fixes both, the defaults (4 bits, groups of 64) stand for "not said".

    Args:
        bits: Bits of one code.
        group_size: Weights that share a scale.
        mode: One of `MODES`.
        where: Whose arguments they are, for the error, such as `"overrides['lm_head']: "`.

    Raises:
        QuantizationError: Something MLX has no kernels for; the text says what it has.

    Examples:
        >>> check_format(4, 64, "mxfp4")
        Format(bits=4, group_size=32, mode='mxfp4', quantize_input=False, scale_dtype=None)
    """
    if mode not in MODES:
        raise QuantizationError(f"{where}mode={mode!r} is unknown. MLX has {_listed(map(repr, MODES))}.")
    assert isinstance(mode, str)
    bits = whole_number(bits, f"{where}bits", error=QuantizationError)
    group_size = whole_number(group_size, f"{where}group_size", error=QuantizationError)
    if mode != "affine":
        size, width = FIXED_MODES[mode]
        if bits not in (width, DEFAULT_BITS) or group_size not in (size, DEFAULT_GROUP_SIZE):
            raise QuantizationError(
                f"{where}{bits} bits in groups of {group_size} do not exist in mode {mode!r}: "
                f"it always has {width} bits in groups of {size}. Leave bits and group_size out, or use mode='affine'."
            )
        return Format(width, size, mode)
    if bits not in AFFINE_BITS or group_size not in AFFINE_GROUP_SIZES:
        if bits in AFFINE_GROUP_SIZES and (group_size in AFFINE_BITS or group_size <= 16):
            raise QuantizationError(
                f"{where}{bits} bits in groups of {group_size}: the two seem to be swapped. Here bits come first and "
                f"the group size second; mlx.nn.quantize has them the other way round. Use bits={group_size}, "
                f"group_size={bits}."
            )
        wrong = f"bits={bits}" if bits not in AFFINE_BITS else f"group_size={group_size}"
        raise QuantizationError(
            f"{where}{wrong} is not supported in mode 'affine': MLX has {_listed(AFFINE_BITS)} bits in groups of "
            f"{_listed(AFFINE_GROUP_SIZES)}."
        )
    return Format(bits, group_size, mode)


def _listed(values: object) -> str:
    texts = [str(v) for v in values]  # type: ignore[attr-defined]
    return ", ".join(texts[:-1]) + " and " + texts[-1]
