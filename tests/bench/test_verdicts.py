"""Each verdict on figures on either side of its threshold."""

import pytest

from mlx_tune.bench import verdicts
from mlx_tune.bench.verdicts import Verdict


def step(predicted=100, floor=100, predicted_peak=200, peak=200):
    return {
        "predicted_floor_bytes": predicted,
        "floor_bytes": floor,
        "predicted_peak_bytes": predicted_peak,
        "peak_bytes": peak,
    }


def steps(**changed):
    return {"plain": step(), "checkpointed": step(**changed)}


def curve(peak, limit=100, held_back=90, free=200):
    return {
        "curve": [{"limit_bytes": limit, "peak_bytes": peak}],
        "held_back_peak_bytes": held_back,
        "free_peak_bytes": free,
    }


def tightest(peak, slowdown=0.0, uncertainty=0.01):
    best = {"peak_bytes": peak, "slowdown": slowdown, "uncertainty": uncertainty}
    return {"tightest": best, "free_peak_bytes": 100}


def checkpointed(peak=50, seconds=1.4):
    plain = {"peak_bytes": 100, "seconds": 1.0}
    return {"plain": plain, "checkpointed": {"peak_bytes": peak, "seconds": seconds}}


def search(peaks=(90, 100), trained=100, steps=10.0):
    return {
        "budget_bytes": 100,
        "trial_peaks_bytes": list(peaks),
        "trained_peak_bytes": trained,
        "batch_size": 4,
        "rows_by_floor": 5,
        "steps_of_the_answer": steps,
    }


def packed(one=1.0, many=1.0, share=0.28125, missing=None):
    speed = {
        str(rows): {"ratio": ratio, "uncertainty": 0.0, "missing": missing} for rows, ratio in ((1, one), (16, many))
    }
    return {"formats": {"4 bits, group 64": {"speed": speed, "share_of_bfloat16": share}}}


def wired(gain, uncertainty=0.0):
    return {"gain": gain, "uncertainty": uncertainty, "bytes": 10**9}


def lazy(grown=0, evaluated=2.0):
    return {
        "grown_bytes_by_building": grown,
        "operations": 10,
        "array_bytes": 1000,
        "built_seconds": 1.0,
        "evaluated_seconds": evaluated,
    }


def shared(grown, readers=2):
    return {"grown_bytes": grown, "array_bytes": 1000, "readers": readers}


@pytest.mark.parametrize(
    ("judge", "figures", "holds", "words"),
    [
        (verdicts.floor_is_foreseen, steps(predicted=104), True, "plain +0.0 %, checkpointed +4.0 %"),
        (verdicts.floor_is_foreseen, steps(predicted=106), False, "+6.0 %"),
        (verdicts.floor_is_foreseen, steps(predicted=94), False, "-6.0 %"),
        (verdicts.peak_is_bounded, steps(peak=204), True, "102 % of it"),
        (verdicts.peak_is_bounded, steps(peak=206), False, "103 % of it"),
        (verdicts.limit_holds_peaks, curve(109), True, "at most 9.0 % above"),
        (verdicts.limit_holds_peaks, curve(111), False, "at most 11.0 % above"),
        (verdicts.limit_holds_peaks, curve(130, limit=1, held_back=120), True, "held back"),
        (verdicts.limit_is_cheap, tightest(98), True, "2 % less"),
        (verdicts.limit_is_cheap, tightest(99), False, "1 % less"),
        (verdicts.limit_is_cheap, tightest(50, 0.039), True, "50 % less), +3.9 ± 1.0 % of time"),
        (verdicts.limit_is_cheap, tightest(50, 0.041), False, "+4.1 ± 1.0 % of time"),
        (verdicts.limit_is_cheap, tightest(50, 0.0, 0.06), None, "steps scatter too much here to tell"),
        (verdicts.limit_is_cheap, tightest(99, 0.0, 0.06), False, "1 % less"),
        (verdicts.gradients_are_equal, {"gradients": {"equal": True, "parameters": 3, "largest_difference": 0}}, True,
         "3 parameters"),
        (verdicts.gradients_are_equal, {"gradients": {"equal": False, "parameters": 3, "largest_difference": 0.5}},
         False, "largest difference 0.5"),
        (verdicts.gradients_are_equal, {"gradients": None}, None, "not measured"),
        (verdicts.checkpoints_save, checkpointed(peak=99), True, "1 % less"),
        (verdicts.checkpoints_save, checkpointed(peak=100), False, "0 % less"),
        (verdicts.checkpoints_cost_a_forward_pass, checkpointed(seconds=1.5), True, "+50 %"),
        (verdicts.checkpoints_cost_a_forward_pass, checkpointed(seconds=1.8), False, "+80 %"),
        (verdicts.trials_stay_within, search(), True, "0 of 2 above, the highest 100.0 %"),
        (verdicts.trials_stay_within, search(peaks=(90, None, 101)), False, "1 of 2 above"),
        (verdicts.answer_trains_within, search(), True, "at 4 rows, the floors say 5"),
        (verdicts.answer_trains_within, search(trained=101), False, "101.0 % of the budget"),
        (verdicts.search_is_short, search(steps=25), True, "25.0 steps, 2 sizes"),
        (verdicts.search_is_short, search(steps=25.2), False, "25.2 steps"),
        (verdicts.packed_size, packed(), True, "71.9 % smaller"),
        (verdicts.packed_size, packed(share=0.3), False, "70.0 % smaller"),
        (verdicts.one_row_is_faster, packed(one=1.0, many=0.1), True, "1.00 times the speed at 1 row"),
        (verdicts.one_row_is_faster, packed(one=0.99, many=5), False, "0.99"),
        (verdicts.one_row_is_faster, packed(one=None, missing="no kernel"), None, "4 bits, group 64: no kernel"),
        (verdicts.many_rows_are_slower, packed(one=5, many=0.99), True, "0.99 times the speed at 16 rows"),
        (verdicts.many_rows_are_slower, packed(one=0.1, many=1.0), False, "1.00"),
        (verdicts.many_rows_are_slower, packed(many=None, missing="no kernel"), None, "no kernel"),
        (verdicts.kernels_are_right, {"tried": 3, "faults": []}, True, "3 of 3"),
        (verdicts.kernels_are_right, {"tried": 3, "faults": ["it is wrong"]}, False, "2 of 3: it is wrong"),
        (verdicts.wiring_gains_nothing, wired(0.019), True, "+1.9 ± 0.0 % in speed, 1.00 GB"),
        (verdicts.wiring_gains_nothing, wired(0.3, uncertainty=0.2), True, "+30.0 ± 40.0 %"),
        (verdicts.wiring_gains_nothing, wired(0.3, uncertainty=0.1), False, "+30.0 ± 20.0 %"),
        (verdicts.building_takes_no_memory, lazy(grown=9), True, "9 B for 10 operations on 1.00 kB"),
        (verdicts.building_takes_no_memory, lazy(grown=10), False, "10 B"),
        (verdicts.evaluating_does_the_work, lazy(), True, "built in 1.00 s, evaluated in 2.00 s"),
        (verdicts.evaluating_does_the_work, lazy(evaluated=1.0), False, "evaluated in 1.00 s"),
        (verdicts.nobody_copies, shared(8), True, "8 B more for 1.00 kB"),
        (verdicts.nobody_copies, shared(1000), False, "1.00 kB more"),
        (verdicts.nobody_copies, shared(8, readers=1), None, "nobody to share with"),
    ],
)  # fmt: skip
def test_a_verdict(judge, figures, holds, words):
    verdict = judge(figures)
    assert isinstance(verdict, Verdict)
    assert verdict.holds is holds, verdict
    assert words in verdict.measured
