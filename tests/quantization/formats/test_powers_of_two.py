import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_toys import stored_by_mlx

from mlx_tune.quantization.formats.affine import dequantize_float32, quantize_affine
from mlx_tune.quantization.formats.modes import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlx_tune.quantization.formats.packing import unpack

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@st.composite
def weights_of_any_magnitude(draw):
    """Finite weights from the smallest denormal to the largest number of each dtype."""
    group_size, dtype = draw(st.sampled_from(AFFINE_GROUP_SIZES)), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (2, 2 * group_size)
    kind = draw(st.sampled_from(["even", "heavy", "one-sided", "all magnitudes"]))
    shares = {
        "even": lambda: rng.uniform(-1, 1, shape),
        "heavy": lambda: np.clip(rng.standard_t(2, shape) / 8, -1, 1),
        "one-sided": lambda: rng.uniform(0.5, 1, shape),
        "all magnitudes": lambda: rng.choice([-1, 1], shape) * 10.0 ** -rng.uniform(0, 30, shape),
    }[kind]()
    most = float(mx.finfo(dtype).max)
    least = {mx.float16: -7}.get(dtype, -44)
    scale = draw(st.one_of(st.just(most), st.floats(least, math.log10(most)).map(lambda e: min(most, 10.0**e))))
    return mx.array((shares * scale).astype(np.float32)).astype(dtype), group_size


def squared_errors(weight, packed, scales, biases, bits, group_size):
    """Each group's, in float64, infinite where unpacking in float32 is; and the weights' own squares."""
    codes, w, scale, bias = (
        np.array(x.astype(mx.float32), dtype=np.float64).reshape(-1, n)
        for x, n in ((unpack(packed, bits), group_size), (weight, group_size), (scales, 1), (biases, 1))
    )
    with np.errstate(all="ignore"):
        errors = np.square(w - (codes * scale + bias)).sum(-1)
    after = np.array(dequantize_float32(packed, scales, biases, bits, group_size)).reshape(-1, group_size)
    return np.where(np.isfinite(after).all(-1), errors, np.inf), np.square(w).sum(-1)


@settings(max_examples=60, deadline=None)
@given(weights_of_any_magnitude(), st.sampled_from(AFFINE_BITS))
def test_no_group_is_worse_and_none_infinite_at_any_magnitude(made, bits):
    weight, group_size = made
    before, _ = squared_errors(weight, *stored_by_mlx(weight, group_size, bits), bits, group_size)
    after, energy = squared_errors(weight, *quantize_affine(weight, bits, group_size), bits, group_size)
    assert np.isfinite(after).all()
    assert (after <= before * (1 + 1e-4) + 1e-11 * energy).all(), (before, after)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_power_of_two_changes_nothing_but_the_scales(bits, dtype):
    weight = mx.random.normal((8, 128), key=mx.random.key(3)).astype(dtype)
    plain = quantize_affine(weight, bits, 64)
    for power in (2.0**100, 2.0**-60):
        packed, scales, biases = quantize_affine(weight * power, bits, 64)
        errors, _ = squared_errors(weight, packed, scales / power, biases / power, bits, 64)
        expected, _ = squared_errors(weight, *plain, bits, 64)
        assert errors.sum() <= 1.02 * expected.sum()
