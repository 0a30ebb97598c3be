from __future__ import annotations

import mlx.core as mx
import pytest
from planted_kernels import nan, wrong_at_width_128_from_two_rows
from quantization_toys import llama

import mlx_tune as mt


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_size_is_met_with_other_formats(plant, calibrated):
    plant(multiply=wrong_at_width_128_from_two_rows)
    calibration = [mx.random.randint(0, 96, (2, 17), key=mx.random.key(i)) for i in range(2)] if calibrated else None
    report = mt.quantize_model(llama(), target_bpw=5.0, method="nearest", calibration=calibration, progress=False)
    assert report.bits_per_weight <= 5.0
    narrow = [layer for layer in report.layers if layer.shape[-1] == 128]
    assert narrow
    assert not [x for x in narrow if x.bits in (4, 8) and x.mode == "affine"]
    given = [note for note in report.notes if "given another format" in note]
    honest = mt.plan_quantization(
        llama(), target_bpw=5.0, method="nearest", calibration=calibration, verify_kernels=False
    )
    assert given or not any(x.bits in (4, 8) for x in honest.layers if x.shape[-1] == 128)


def test_a_size_is_met_around_layers_that_have_to_stay_unpacked(plant):
    plant(multiply=wrong_at_width_128_from_two_rows)
    overrides = {"*.q_proj": {"bits": 8}}
    plan = mt.plan_quantization(llama(), target_bpw=8.0, method="nearest", overrides=overrides)
    assert plan.bits_per_weight <= 8.0
    kept = [layer for layer in plan.skipped if "computes it wrong" in str(layer.reason)]
    assert [layer.path for layer in kept] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert [note for note in plan.notes if "2 layers were left unpacked" in note]


def test_formats_that_nothing_chose_are_not_tried(plant):
    planted = plant()
    plan = mt.plan_quantization(llama(), target_bpw=5.0, method="nearest")
    chosen = {(layer.format, layer.shape[-1]) for layer in plan.layers}
    # 21 formats and two widths would be 84 products; the winner and what it was compared with are far fewer.
    assert 2 * len(chosen) <= planted.calls["multiply"] <= 2 * (len(chosen) + 2)


def test_a_size_that_only_wrong_formats_would_meet_is_refused_with_the_reason(plant):
    plant(multiply=nan)
    with pytest.raises(mt.QuantizationError, match=r"cannot be met.*given another format") as caught:
        mt.quantize_model(llama(), target_bpw=4.0, method="nearest", progress=False)
    assert "is wrong on this backend" in str(caught.value)
