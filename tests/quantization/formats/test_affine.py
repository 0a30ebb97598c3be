import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_toys import stored_by_mlx

from mlx_tune.devices import backend
from mlx_tune.errors import QuantizationError
from mlx_tune.measuring.float32_products import matmul_float32, rounds_factors
from mlx_tune.quantization.formats import affine, scale_search
from mlx_tune.quantization.formats.affine import dequantize_float32, group_errors, quantize_affine
from mlx_tune.quantization.formats.packing import AFFINE_BITS, AFFINE_GROUP_SIZES, unpack

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


def test_chunks_do_not_show(monkeypatch):
    weight = mx.random.normal((40, 128), key=mx.random.key(4)).astype(mx.float16)
    whole = quantize_affine(weight, 4, 32)
    monkeypatch.setattr(affine, "_CPU_GROUPS", 12)
    monkeypatch.setattr(affine, "_GPU_GROUPS", 12)
    for a, b in zip(whole, quantize_affine(weight, 4, 32), strict=True):
        assert mx.array_equal(a, b).item()


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
