import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.quantization.formats.float_modes import quantize_float
from mlx_tune.quantization.formats.modes import FIXED_MODES


def errors(weight: mx.array, packed: mx.array, scales: mx.array, mode: str) -> np.ndarray:
    """Squared error of each group, in float64."""
    size, bits = FIXED_MODES[mode]
    after = mx.dequantize(packed, scales, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
    difference = np.array(weight.astype(mx.float32), dtype=np.float64) - np.array(after, dtype=np.float64)
    return (difference.reshape(-1, size) ** 2).sum(-1)


WEIGHTS = {
    "normal": mx.random.normal((64, 256), key=mx.random.key(0)),
    "heavy tails": mx.random.normal((64, 256), key=mx.random.key(1)) ** 3,
    "bfloat16": mx.random.normal((64, 256), key=mx.random.key(2)).astype(mx.bfloat16),
    "tiny": 1e-6 * mx.random.normal((64, 256), key=mx.random.key(3)),
    "huge": 1e6 * mx.random.normal((64, 256), key=mx.random.key(4)),
    "zeros": mx.zeros((4, 64)),
    "one outlier": mx.zeros((4, 64)) + 100 * (mx.arange(64) == 5),
    "experts": mx.random.normal((3, 16, 64), key=mx.random.key(5)),
    "odd": mx.random.normal((5, 96), key=mx.random.key(6)),
}


@pytest.mark.parametrize("mode", FIXED_MODES)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_no_group_is_worse(mode: str, weight: mx.array) -> None:
    size, bits = FIXED_MODES[mode]
    theirs = mx.quantize(weight, size, bits, mode=mode)
    ours = quantize_float(weight, mode)
    assert [a.shape for a in ours] == [a.shape for a in theirs]
    assert [a.dtype for a in ours] == [a.dtype for a in theirs]
    before, after = errors(weight, *theirs, mode), errors(weight, *ours, mode)
    assert (after <= before * (1 + 1e-5)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FIXED_MODES)),
    st.sampled_from(("float32", "bfloat16", "float16")),
    st.floats(-45, 38.53),
    st.integers(0, 2**32 - 1),
)
def test_no_group_is_worse_and_none_infinite_at_any_magnitude(mode: str, name: str, power: float, seed: int) -> None:
    size, bits = FIXED_MODES[mode]
    dtype = getattr(mx, name)
    largest = min(10.0**power, float(mx.finfo(dtype).max))
    weight = mx.array((np.random.default_rng(seed).uniform(-1, 1, (2, 64)) * largest).astype(np.float32)).astype(dtype)
    theirs, ours = mx.quantize(weight, size, bits, mode=mode), quantize_float(weight, mode)
    with np.errstate(all="ignore"):
        before, after = (np.nan_to_num(errors(weight, *pair, mode), nan=np.inf) for pair in (theirs, ours))
    assert np.isfinite(after).all()
    assert (after / (1 + 1e-5) <= before).all()
    assert (after <= np.square(np.array(weight.astype(mx.float32), dtype=np.float64)).reshape(-1, size).sum(-1)).all()


@pytest.mark.parametrize(("mode", "most"), [("mxfp4", 0.97), ("nvfp4", 0.92), ("mxfp8", 1.0)])
def test_four_bits_gain(mode: str, most: float) -> None:
    size, bits = FIXED_MODES[mode]
    weight = WEIGHTS["normal"]
    before = errors(weight, *mx.quantize(weight, size, bits, mode=mode), mode).sum()
    fast = errors(weight, *quantize_float(weight, mode), mode).sum()
    best = errors(weight, *quantize_float(weight, mode, effort="best"), mode).sum()
    assert best <= fast * (1 + 1e-6)
    assert fast <= most * before


def test_columns_that_do_not_fill_packs_of_32_are_left_to_mlx() -> None:
    weight = mx.random.normal((4, 80))
    ours, theirs = quantize_float(weight, "nvfp4"), mx.quantize(weight, 16, 4, mode="nvfp4")
    assert all(mx.array_equal(a, b).item() for a, b in zip(ours, theirs, strict=True))
