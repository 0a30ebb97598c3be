import mlx.core as mx
import numpy as np
import pytest
from quantization_toys import stored_by_mlx

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats import packing
from mlx_tune.quantization.formats.modes import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlx_tune.quantization.formats.packing import check_affine, dequantize_float32, pack, quantize_nearest, unpack

every_format = pytest.mark.parametrize(
    ("bits", "group_size"), [(bits, size) for bits in AFFINE_BITS for size in AFFINE_GROUP_SIZES]
)


def stream_of_bits(codes, bits):
    """The format written out naively: each row one little-endian stream of bits."""
    rows = []
    for row in codes:
        stream = sum(int(code) << (k * bits) for k, code in enumerate(row))
        rows.append([(stream >> (32 * j)) & 0xFFFFFFFF for j in range(len(row) * bits // 32)])
    return np.array(rows, dtype=np.uint32)


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_packing_is_a_little_endian_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96))
    packed = pack(mx.array(codes), bits)
    assert packed.dtype == mx.uint32
    np.testing.assert_array_equal(np.array(packed), stream_of_bits(codes, bits))
    np.testing.assert_array_equal(np.array(unpack(packed, bits)), codes)


@every_format
@pytest.mark.parametrize("shape", [(4, 256), (2, 3, 128)])
def test_packing_is_bit_exact_against_mlx(bits, group_size, shape):
    weight = mx.random.normal(shape, key=mx.random.key(7))
    packed, scales, biases = stored_by_mlx(weight, group_size, bits)
    codes = unpack(packed, bits)
    assert int(codes.max().item()) < 2**bits
    assert mx.array_equal(pack(codes, bits), packed).item()
    by_hand = np.repeat(np.array(scales), group_size, -1) * np.array(codes) + np.repeat(
        np.array(biases), group_size, -1
    )
    np.testing.assert_allclose(
        np.array(dequantize_float32(packed, scales, biases, bits, group_size)), by_hand, rtol=0, atol=2e-6
    )


def test_dequantizing_bfloat16_adds_no_rounding_of_its_own():
    weight = mx.random.normal((8, 64), key=mx.random.key(3)).astype(mx.bfloat16)
    packed, scales, biases = mx.quantize(weight, bits=8, group_size=64)
    exact = dequantize_float32(packed, scales, biases, 8, 64)
    assert exact.dtype == mx.float32
    assert not mx.array_equal(exact, mx.dequantize(packed, scales, biases, bits=8).astype(mx.float32)).item()
    as_float32 = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), bits=8)
    assert mx.array_equal(exact, as_float32).item()


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "text"),
    [
        ((4, 64), 7, 64, "bits=7: affine quantization has 1, 2, 3, 4, 5, 6 and 8."),
        ((4, 64), 4, 16, "group_size=16: affine quantization has 32, 64 and 128."),
        ((64,), 4, 64, r"shape \[64\] has no rows"),
        ((4, 96), 4, 64, r"shape \[4, 96\] has 96 columns, not divisible by group_size=64: group_size=32 would do."),
        ((4, 80), 4, 32, "no group size divides it"),
    ],
)
def test_what_the_format_lacks_is_said(shape, bits, group_size, text):
    with pytest.raises(QuantizationError, match=text):
        check_affine(shape, bits, group_size)


@pytest.mark.parametrize(
    ("here", "bits", "device"), [("cuda", 1, mx.Device(mx.cpu)), ("cuda", 2, None), ("metal", 1, None)]
)
def test_only_what_cuda_lacks_is_packed_on_the_processor(here, bits, device, monkeypatch):
    asked = []

    def noted(name):
        ours = getattr(mx, name)

        def call(*arguments, stream, **keywords):
            asked.append(stream)
            return ours(*arguments, **keywords)

        return call

    stored = mx.quantize(mx.ones((2, 64)), 64, bits)
    monkeypatch.setattr(packing, "backend", lambda: here)
    for name in ("quantize", "dequantize"):
        monkeypatch.setattr(mx, name, noted(name))
    quantize_nearest(mx.ones((2, 64)), 64, bits)
    dequantize_float32(*stored, bits, 64)
    assert asked == [device, device]
