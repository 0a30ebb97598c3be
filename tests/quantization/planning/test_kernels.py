"""Kernels that are wrong or missing are found before a layer is packed: faults planted in what multiplies."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_kernels import FORMATS, USES

from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.planning.kernels import (
    Combination,
    Fault,
    KernelTrial,
    cut_outputs,
    judge,
    tolerance,
)


@given(st.sampled_from(FORMATS), st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(1, 200_000))
def test_cutting_outputs_keeps_what_decides_on_the_kernel(wanted, dtype, outputs):
    for here in ("cuda", "metal"):
        cut = cut_outputs(outputs, here)
        assert cut <= outputs
        assert cut % 128 == outputs % 128
        assert (cut > 2048, cut > 4096) == (outputs > 2048, outputs > 4096)
    assert cut_outputs(outputs, "cpu") <= min(outputs, 32)


@given(st.sampled_from(["float32", "bfloat16", "float16"]), st.sampled_from([64, 1024, 16384]))
def test_what_is_off_by_its_own_size_is_never_within_the_tolerance(dtype, width):
    for here in ("cpu", "cuda", "metal"):
        for use in USES:
            assert tolerance(Combination(use, width, 32, Format(4, 64), dtype), here) < 0.7


def test_a_trial_stops_at_the_first_fault():
    seen = []

    def record(combination, trial):
        seen.append(trial)
        return math.nan

    fault = judge(Combination("gathered", 64, 64, Format(4, 64), "bfloat16"), record, "cuda")
    assert seen == [KernelTrial(1)]
    assert fault.trial == KernelTrial(1)
    assert math.isnan(fault.error)


@pytest.mark.parametrize(
    ("fault", "phrases"),
    [
        (Fault(Combination("product", 64, 64, Format(4, 64), "bfloat16"), KernelTrial(8), 1.0, "", "cuda"),
         ["product of 64 inputs in 4 bits, group 64, bfloat16 at 8 rows is wrong", "by 100 %", "1.8 %", "pull/3160"]),
        (Fault(Combination("product", 96, 64, Format(4, 32), "float32"), KernelTrial(1), None, "No kernel.", "cuda"),
         ["at 1 row does not exist on this backend (cuda): No kernel.", "issues/2536"]),
        (Fault(Combination("gathered", 512, 64, Format(3, 64), "float16"), KernelTrial(8, True), math.inf, "", "metal"),
         ["gathered product of 512 inputs", "8 rows in order", "by inf times", "not in the list of known ones"]),
    ],
)  # fmt: skip
def test_a_fault_says_what_where_and_who_knows_of_it(fault, phrases):
    for phrase in phrases:
        assert phrase in str(fault)
