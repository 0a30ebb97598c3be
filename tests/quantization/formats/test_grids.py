"""Weights that were packed before: found to be so, and got back by "optimal" as they were, but for rounding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.quantization.formats.grids import grid_of, recovers
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.formats.packed_arrays import pack_weight, unpacked

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def on_grid(kind: str, bits: int, group: int, dtype: str, seed: int, rows: int = 24, columns: int = 256) -> mx.array:
    """Weights as they come out of packed ones: scales in half precision, the product rounded to the dtype."""
    rng = np.random.default_rng(seed)
    groups = columns // group
    scales = (0.002 * 2 ** rng.uniform(-2, 2, (rows, groups, 1))).astype(np.float16).astype(np.float32)
    top = 2**bits - 1
    codes = rng.integers(0, top + 1, (rows, groups, group)).astype(np.float32)
    if kind == "ternary":  # BitNet: -1, 0, 1
        codes = rng.integers(-1, 2, codes.shape).astype(np.float32)
        zeros: object = 0.0
    elif kind == "symmetric":  # Q4_0, and GPTQ with symmetric scales: the middle is the last code but one
        zeros = 2.0 ** (bits - 1)
    elif kind == "asymmetric":  # GPTQ and AWQ: a whole zero point for each group
        zeros = rng.integers(0, top + 1, scales.shape).astype(np.float32)
    else:  # Q4_1: any minimum
        assert kind == "minimum"
        zeros = rng.uniform(0, top, scales.shape).astype(np.float32)
    return mx.array(((codes - zeros) * scales).reshape(rows, columns)).astype(DTYPES[dtype])


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["ternary", "symmetric", "asymmetric", "minimum"]),
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**16),
)
def test_grids_of_every_kind_are_recovered(kind: str, bits: int, group: int, dtype: str, seed: int) -> None:
    weight = on_grid(kind, bits, group, dtype, seed)
    wanted = Format(2 if kind == "ternary" else bits, group)
    packed, _ = pack_weight(weight, wanted, "optimal")
    assert recovers(weight, packed, wanted)
    error = mx.abs(unpacked(packed, wanted)(slice(0, 24)) - weight.astype(mx.float32)).reshape(24, -1, group).max(-1)
    largest = mx.abs(weight.astype(mx.float32)).reshape(24, -1, group).max(-1)
    assert (error <= 4 * mx.finfo(weight.dtype).eps * largest).all().item()
    found = grid_of(weight)
    assert found is not None
    assert (found.bits, found.group_size) == (wanted.bits, group)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_group_of_another_size_is_not_recovered(dtype: str) -> None:
    weight, wanted = on_grid("minimum", 4, 32, dtype, seed=0), Format(4, 64)
    assert not recovers(weight, pack_weight(weight, wanted, "optimal")[0], wanted)
    assert grid_of(weight) == Format(4, 32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_weights_on_no_grid_are_not_recovered_however_fine_the_format(bits: int, dtype: str) -> None:
    weight = mx.random.normal((24, 256), key=mx.random.key(bits)).astype(DTYPES[dtype])
    for method in ("nearest", "optimal"):
        assert not recovers(weight, pack_weight(weight, Format(bits, 32), method)[0], Format(bits, 32))
    assert grid_of(weight) is None


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_finer_grids_are_recovered_in_float32(bits: int) -> None:
    weight, wanted = on_grid("symmetric", bits, 32, "float32", seed=bits), Format(bits, 32)
    assert recovers(weight, pack_weight(weight, wanted, "optimal")[0], wanted)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_levels_of_floats_are_recovered_by_their_mode(mode: str) -> None:
    group, bits = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}[mode]
    wanted = Format(bits, group, mode)
    packed, _ = pack_weight(mx.random.normal((24, 256), key=mx.random.key(1)), wanted, "nearest")
    weight = unpacked(packed, wanted)(slice(0, 24)).astype(mx.bfloat16)
    assert recovers(weight, pack_weight(weight, wanted, "optimal")[0], wanted)
    assert grid_of(weight) == (wanted if mode == "mxfp4" else None)  # others show no few levels


def test_constant_weights_odd_widths_and_infinities_are_no_grid() -> None:
    assert grid_of(mx.ones((4, 64))) is None
    assert grid_of(mx.zeros((4, 64))) is None
    assert grid_of(mx.zeros((4, 65))) is None
    assert grid_of(mx.array([[1.0, float("inf")] * 32])) is None


def test_rows_that_are_all_zero_are_recovered() -> None:
    weight = on_grid("ternary", 2, 64, "bfloat16", seed=3)
    weight[3] = 0
    wanted = Format(2, 64)
    assert recovers(weight, pack_weight(weight, wanted, "optimal")[0], wanted)
