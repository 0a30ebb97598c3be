from __future__ import annotations

import math

import mlx.core as mx
import pytest
from planted_kernels import FORMATS, USES, Planted, garbage, nan
from quantization_toys import llama

import mlx_tune as mt
from mlx_tune.devices import backend
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.planning.kernel_trials import Kernels, measure
from mlx_tune.quantization.planning.kernels import (
    Combination,
    combinations,
    judge,
)


def one_output_off(result, arrays, parts):
    return result.at[..., result.shape[-1] // 2].add(mx.abs(result).max())


def infinite(result, arrays, parts):
    return result.at[..., 0].add(math.inf)


def all_zeros(result, arrays, parts):
    return mx.zeros_like(result)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wanted", FORMATS, ids=str)
def test_mlx_is_right_here_in_every_format_and_use(wanted, use):
    if wanted.bits == 1 and backend() == "cuda":
        pytest.skip("CUDA has no kernels of 1 bit: ml-explore/mlx#2536")
    for dtype in ("float32", "bfloat16"):
        for tried in combinations([use], (2, 40, 256), wanted, dtype, "cpu"):
            assert judge(tried, measure, "cpu") is None


@pytest.mark.parametrize("spoil", [garbage, nan, infinite, all_zeros, one_output_off])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("wanted", [Format(3, 32), Format(8, 64), Format(4, 32, "mxfp4")], ids=str)
def test_a_result_that_is_wrong_is_told_from_rounding(wanted, use, spoil):
    kernels = Planted(multiply=spoil, gather=spoil, dequantize=spoil).kernels
    for dtype in ("float32", "bfloat16"):
        (tried,) = combinations([use], (2, 40, 256), wanted, dtype, "cpu")
        fault = judge(tried, lambda combination, trial: measure(combination, trial, kernels), "cpu")
        assert fault is not None
        assert fault.message == ""  # a number that is wrong, not a call that failed


def test_a_gathered_product_that_takes_the_wrong_matrix_is_found():
    def always_the_first(*arrays, rhs_indices, **parts):
        return mx.gather_qmm(*arrays, rhs_indices=mx.zeros_like(rhs_indices), **parts)

    tried = Combination("gathered", 128, 32, Format(4, 64), "float32")
    for trial in tried.trials:
        assert measure(tried, trial, Kernels(gather=always_the_first)) > 0.5


def test_random_numbers_are_the_same_afterwards(plant):
    model, planted = llama(), plant()
    mx.random.seed(3)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(3)
    mt.plan_quantization(model)
    assert planted.calls
    assert mx.random.normal((4,)).tolist() == expected


def test_as_many_multiplications_as_there_are_combinations(plant):
    planted = plant()
    mt.plan_quantization(llama())  # width 128 and 256, tied embeddings
    # One lookup; the embedding's product is that of the layers of width 128; 128 and 256 at one row and at eight.
    assert planted.calls == {"dequantize": 1, "multiply": 4}
    mt.plan_quantization(llama())
    mt.quantize_model(llama(), progress=False)
    assert planted.calls == {"dequantize": 1, "multiply": 4}
    mt.plan_quantization(llama(), 8)
    assert planted.calls == {"dequantize": 2, "multiply": 8}


def test_nothing_is_multiplied_where_it_was_turned_off(plant):
    planted = plant(multiply=nan, gather=nan, dequantize=nan)
    assert not mt.plan_quantization(llama(), verify_kernels=False).skipped
    assert not mt.quantize_model(llama(), verify_kernels=False, progress=False).skipped
    mt.quantize_model(llama(), target_bpw=5, method="nearest", verify_kernels=False, progress=False)
    assert not planted.calls
