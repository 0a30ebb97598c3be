import mlx.core as mx
import numpy as np
import pytest

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.modes import AFFINE_BITS, AFFINE_GROUP_SIZES, FIXED_MODES, Format, check_format


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group_size", AFFINE_GROUP_SIZES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_affine_bytes_are_those_that_mlx_allocates(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    weight = mx.ones((6, 256), dtype=dtype)
    packed = mx.quantize(weight, group_size, bits)
    expected = sum(a.nbytes for a in packed)
    assert Format(bits, group_size).nbytes(weight.size, dtype.size) == expected


@pytest.mark.parametrize("mode", FIXED_MODES)
def test_other_modes_bytes_are_those_that_mlx_allocates(mode: str) -> None:
    chosen = check_format(4, 64, mode)
    weight = mx.ones((6, 256), dtype=mx.bfloat16)
    packed = mx.quantize(weight, chosen.group_size, chosen.bits, mode=mode)
    assert chosen.nbytes(weight.size, 2) == sum(a.nbytes for a in packed)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((64, 4, "affine"), "64 bits in groups of 4: the two seem to be swapped.*bits=4, group_size=64"),
        ((128, 8, "affine"), "seem to be swapped"),
        ((7, 64, "affine"), "bits=7 is not supported in mode 'affine': MLX has 1, 2, 3, 4, 5, 6 and 8 bits"),
        ((4, 48, "affine"), "group_size=48 is not supported.*groups of 32, 64 and 128"),
        ((4, 64, "int4"), "mode='int4' is unknown. MLX has 'affine', 'mxfp4', 'mxfp8' and 'nvfp4'"),
        ((3, 64, "mxfp4"), "3 bits in groups of 64 do not exist in mode 'mxfp4': it always has 4 bits in groups of 32"),
        ((4.0, 64, "affine"), "bits=4.0 must be a whole number"),
        ((4, True, "affine"), "group_size=True must be a whole number"),
    ],
)
def test_a_format_that_does_not_exist_is_named(arguments: tuple[object, object, object], text: str) -> None:
    with pytest.raises(QuantizationError, match=text):
        check_format(*arguments)


def test_the_text_says_whose_format_it_is() -> None:
    with pytest.raises(QuantizationError, match=r"^overrides\['head'\]: bits=9"):
        check_format(9, 64, "affine", where="overrides['head']: ")


def test_numbers_of_numpy_do_as_well() -> None:
    found = check_format(np.int64(4), np.int32(64), "affine")
    assert found == Format(4, 64)
    assert {type(found.bits), type(found.group_size)} == {int}
