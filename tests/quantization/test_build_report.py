import mlx.nn as nn

import mlx_tune as mt
from mlx_tune.measuring import float32_products


def quiet(model: nn.Module, *args, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, *args, progress=False, **kwargs)


def test_weights_out_of_a_modes_range_are_in_the_notes() -> None:
    model = nn.Sequential(*(nn.Linear(128, 16, bias=False) for _ in range(2)))
    model.layers[1].weight = model.layers[1].weight * 1e6  # nvfp4's scales end at 448
    report = quiet(model, mode="nvfp4")
    assert any("more than half as large as the weights in layers.1 (0." in note for note in report.notes)


def test_the_arithmetic_that_judged_is_in_the_report(monkeypatch) -> None:
    monkeypatch.setattr(float32_products, "_rounds_factors", lambda device: True)
    report = quiet(nn.Sequential(nn.Linear(128, 16)))
    assert "ten bits on this device (TF32)" in report.arithmetic
    assert report.to_dict()["arithmetic"] == report.arithmetic
    assert report.arithmetic in str(report)
