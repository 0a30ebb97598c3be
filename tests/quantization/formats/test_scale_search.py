import mlx.core as mx
import numpy as np
import pytest

from mlx_tune.quantization.formats import scale_search
from mlx_tune.quantization.formats.affine import dequantize_float32, group_errors, quantize_affine

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "levels"),
    [(2, (-1, 0, 1)), (2, (-2, -1, 0, 1)), (3, tuple(range(-3, 4))), (4, tuple(range(-7, 8))), (4, (-1, 0, 1))],
)
def test_weights_trained_on_a_grid_are_recovered_exactly(dtype, bits, levels):
    rng = np.random.default_rng(bits)
    codes = rng.choice(levels, (64, 128))
    scales = 2.0 ** rng.integers(-6, -3, (64, 2)) * (1 + rng.integers(0, 16, (64, 2)) / 16)  # exact in every dtype
    weight = mx.array((codes * np.repeat(scales, 64, -1)).astype(np.float32)).astype(dtype)
    quantized = quantize_affine(weight, bits, 64)
    assert mx.array_equal(dequantize_float32(*quantized, bits, 64), weight.astype(mx.float32)).item()


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_grids_of_many_levels_are_recovered_exactly(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (64, 128))
    weight = mx.array((codes * np.repeat(2.0 ** rng.integers(-9, -5, (64, 2)) * 1.5, 64, -1)).astype(np.float32))
    quantized = quantize_affine(weight, bits, 64)
    assert mx.array_equal(dequantize_float32(*quantized, bits, 64), weight).item()


def test_chunks_do_not_show():
    weight = mx.random.normal((40, 128), key=mx.random.key(4)).astype(mx.float16)
    whole = quantize_affine(weight, 4, 32)
    for a, b in zip(whole, quantize_affine(weight, 4, 32, groups_at_once=12), strict=True):
        assert mx.array_equal(a, b).item()


@pytest.mark.parametrize("bits", [4, 6])
def test_waiting_for_a_gpu_does_not_show(bits, monkeypatch):
    weight = mx.random.normal((40, 128), key=mx.random.key(4)).astype(mx.float16)
    monkeypatch.setattr(scale_search, "computes_on_cpu", lambda: False)
    free = quantize_affine(weight, bits, 32)
    monkeypatch.setattr(scale_search, "_PACED_BYTES", 0)
    asked, start = [], mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *parts: (asked.append(len(parts)), start(*parts)))
    for a, b in zip(free, quantize_affine(weight, bits, 32), strict=True):
        assert mx.array_equal(a, b).item()
    assert len(asked) > 8  # once for each scale and start at least


@pytest.mark.cpu_only
def test_without_a_compiler_the_result_is_as_good(monkeypatch):
    weight = mx.random.normal((16, 128), key=mx.random.key(4)).astype(mx.bfloat16)
    compiled = group_errors(weight, *quantize_affine(weight, 4), 4, 64).sum().item()
    monkeypatch.setattr(scale_search, "can_compile", lambda device: False)
    assert group_errors(weight, *quantize_affine(weight, 4), 4, 64).sum().item() == pytest.approx(compiled, rel=1e-3)


def test_a_missing_compiler_is_noticed(monkeypatch):
    def fails(function):
        def call(*_):
            raise RuntimeError("g++: not found")

        return call

    monkeypatch.setattr(mx, "compile", fails)
    assert scale_search.can_compile.__wrapped__(mx.default_device().type) is False
