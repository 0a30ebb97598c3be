import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_toys import stored_by_mlx

from mlx_tune.devices import backend
from mlx_tune.errors import QuantizationError
from mlx_tune.measuring.float32_products import matmul_float32, rounds_factors
from mlx_tune.quantization.formats.affine import dequantize_float32, group_errors, quantize_affine
from mlx_tune.quantization.formats.modes import AFFINE_BITS, AFFINE_GROUP_SIZES
from mlx_tune.quantization.formats.packing import unpack

DTYPES = (mx.float32, mx.float16, mx.bfloat16)


@st.composite
def weights(draw):
    """Weights of many kinds: heavy tails, outliers, constants, few levels, zeros, huge and tiny ones, all mixed."""
    group_size = draw(st.sampled_from(AFFINE_GROUP_SIZES))
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (rows, groups * group_size)
    kind = draw(st.sampled_from(["normal", "heavy", "outlier", "constant", "levels", "one-sided", "zeros"]))
    made = {
        "normal": lambda: rng.normal(size=shape),
        "heavy": lambda: np.clip(rng.standard_t(2, size=shape), -1e3, 1e3),
        "outlier": lambda: rng.normal(size=shape) * np.where(rng.random(shape) < 0.01, 100, 1),
        "constant": lambda: np.full(shape, rng.normal()),
        "levels": lambda: rng.integers(-1, 2, shape).astype(float),
        "one-sided": lambda: np.abs(rng.normal(size=shape)) + 3,
        "zeros": lambda: np.zeros(shape),
    }[kind]()
    made = made * 10.0 ** draw(st.integers(-3, 1))
    return mx.array(made.astype(np.float32)).astype(draw(st.sampled_from(DTYPES))), group_size


def assert_never_worse(weight, quantized, bits, group_size, importance=None):
    before = np.array(group_errors(weight, *stored_by_mlx(weight, group_size, bits), bits, group_size, importance))
    after = np.array(group_errors(weight, *quantized, bits, group_size, importance))
    # The sums of squares round: at most that much, relative to the larger of the error and the weights themselves.
    scale = np.array(mx.square(weight.astype(mx.float32)).reshape(*before.shape, group_size).sum(-1))
    assert (after <= before * (1 + 1e-4) + 1e-11 * scale + 1e-37).all(), (before, after)


@settings(max_examples=40, deadline=None)
@given(weights(), st.sampled_from(AFFINE_BITS))
def test_no_group_is_ever_worse_than_nearest(made, bits):
    weight, group_size = made
    quantized = quantize_affine(weight, bits, group_size)
    nearest = stored_by_mlx(weight, group_size, bits)
    assert [(a.shape, a.dtype) for a in quantized] == [(a.shape, a.dtype) for a in nearest]
    assert_never_worse(weight, quantized, bits, group_size)


@settings(max_examples=15, deadline=None)
@given(weights(), st.sampled_from(AFFINE_BITS), st.integers(0, 1000))
def test_no_group_is_worse_in_the_weighted_error_either(made, bits, seed):
    weight, group_size = made
    importance = mx.random.uniform(0.05, 5, (weight.shape[-1],), key=mx.random.key(seed))
    quantized = quantize_affine(weight, bits, group_size, importance=importance)
    assert_never_worse(weight, quantized, bits, group_size, importance)


@pytest.mark.parametrize(
    ("bits", "at_most"), [(1, 0.2), (2, 0.67), (3, 0.77), (4, 0.82), (5, 0.83), (6, 0.82), (8, 0.55)]
)
def test_normal_weights_lose_much_less_than_with_nearest(bits, at_most):
    weight = mx.random.normal((256, 256), key=mx.random.key(0)).astype(mx.bfloat16)
    before = group_errors(weight, *stored_by_mlx(weight, 64, bits), bits, 64).sum()
    fast = group_errors(weight, *quantize_affine(weight, bits, 64), bits, 64).sum()
    assert (fast / before).item() < at_most


def test_best_effort_is_better_still():
    weight = mx.random.normal((64, 256), key=mx.random.key(0)).astype(mx.bfloat16)
    for bits in (2, 4, 8):
        fast = group_errors(weight, *quantize_affine(weight, bits, 64), bits, 64).sum().item()
        best = group_errors(weight, *quantize_affine(weight, bits, 64, effort="best"), bits, 64).sum().item()
        assert best < fast


def test_two_bits_come_near_the_exhaustive_optimum():
    weight = mx.random.normal((4, 32), key=mx.random.key(5))
    found = np.array(group_errors(weight, *quantize_affine(weight, 2, 32, effort="best"), 2, 32)).ravel()
    for row, error in zip(np.array(weight, dtype=np.float64), found, strict=True):
        assert error <= exhaustive_two_bits(row) * 1.01


def exhaustive_two_bits(row):
    """The optimum: codes are monotone in the weight, so try every way to cut the sorted row into four runs."""
    row = np.sort(row)
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(len(row) + 1), 3):
        codes = np.searchsorted(np.array(cuts), np.arange(len(row)), side="right")
        design = np.stack([codes, np.ones(len(row))], 1)
        fit = np.linalg.lstsq(design, row, rcond=None)[0]
        best = min(best, np.square(row - design @ fit).sum())
    return best


def test_weights_quantized_before_are_kept_as_they_are():
    weight = mx.random.normal((32, 128), key=mx.random.key(1))
    stored = mx.quantize(weight, bits=4, group_size=64)
    again = dequantize_float32(*stored, 4, 64)
    error = group_errors(again, *quantize_affine(again, 4, 64), 4, 64)
    assert error.max().item() < 1e-9


def test_importance_moves_the_error_to_the_columns_that_matter_less():
    weight = mx.random.normal((64, 128), key=mx.random.key(2)).astype(mx.bfloat16)
    importance = mx.where(mx.arange(128) % 2 == 0, 10.0, 0.1)

    def by_column(quantized):
        squares = mx.square(weight.astype(mx.float32) - dequantize_float32(*quantized, 3, 64)).sum(0)
        return squares[::2].sum().item(), squares[1::2].sum().item()

    plain, weighted = (
        by_column(quantize_affine(weight, 3)),
        by_column(quantize_affine(weight, 3, importance=importance)),
    )
    assert weighted[0] < 0.9 * plain[0]
    assert weighted[1] > plain[1]


def test_experts_are_solved_each_with_its_own_importance():
    weight = mx.random.normal((3, 16, 64), key=mx.random.key(2)).astype(mx.bfloat16)
    importance = mx.random.uniform(0.1, 3, (3, 64), key=mx.random.key(3))
    together = quantize_affine(weight, 4, 32, importance=importance)
    for expert in range(3):
        alone = quantize_affine(weight[expert], 4, 32, importance=importance[expert])
        for a, b in zip(together, alone, strict=True):
            assert mx.array_equal(a[expert], b).item()


def test_an_importance_of_zero_everywhere_counts_as_uniform():
    weight = mx.random.normal((4, 64), key=mx.random.key(2))
    plain, none = quantize_affine(weight, 4), quantize_affine(weight, 4, importance=mx.zeros((64,)))
    assert mx.allclose(plain[1], none[1], atol=1e-3).item()


@pytest.mark.parametrize(("bits", "group_size"), [(bits, size) for bits in AFFINE_BITS for size in AFFINE_GROUP_SIZES])
def test_mlx_multiplies_with_it_as_with_the_dequantized_weight(bits, group_size):
    if bits == 1 and backend() == "cuda":
        pytest.skip("CUDA has no product of 1 bit: ml-explore/mlx#2536")
    weight = mx.random.normal((24, 256), key=mx.random.key(bits))
    x = mx.random.normal((3, 256), key=mx.random.key(9))
    packed, scales, biases = quantize_affine(weight, bits, group_size)
    product = mx.quantized_matmul(x, packed, scales, biases, group_size=group_size, bits=bits)
    expected = matmul_float32(x, dequantize_float32(packed, scales, biases, bits, group_size).T)
    error = mx.linalg.norm(product - expected) / mx.linalg.norm(expected)
    assert error.item() < (2**-9 if rounds_factors() else 2**-18)


def test_codes_are_whole_and_within_their_bits():
    packed, _, _ = quantize_affine(mx.random.normal((8, 64)), 3, 64)
    assert int(unpack(packed, 3).max().item()) == 7


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: quantize_affine(mx.zeros((2, 64)), 4, 64, effort="more"),
            "effort='more': there are 'fast' and 'best'",
        ),
        (lambda: quantize_affine(mx.zeros((2, 64), mx.int32), 4, 64), "dtype .*int32 cannot be quantized"),
        (lambda: quantize_affine(mx.full((2, 64), float("nan")), 4, 64), r"shape \[2, 64\] holds NaN or infinity"),
        (lambda: quantize_affine(mx.zeros((2, 64)), 4, 64, importance=mx.ones((2,))), r"shape \[2\]: \[64\]"),
        (
            lambda: quantize_affine(mx.zeros((5, 2, 64)), 4, 64, importance=mx.ones((2, 64))),
            r"\[64\], one for each column, is needed, or \[5, 64\]",
        ),
        (lambda: quantize_affine(mx.zeros((2, 64)), 4, 64, importance=-mx.ones((64,))), "negative values"),
        (lambda: quantize_affine(mx.zeros((2, 60)), 4, 64), "60 columns"),
    ],
)
def test_bad_input_is_named(make, text):
    with pytest.raises(QuantizationError, match=text):
        make()
