import mlx.core as mx
import mlx.nn as nn
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.measuring import float32_products
from mlx_tune.quantization.learning import gptq_model


def quiet(model: nn.Module, *args, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, *args, progress=False, **kwargs)


def test_weights_out_of_a_modes_range_are_in_the_notes() -> None:
    model = nn.Sequential(*(nn.Linear(128, 16, bias=False) for _ in range(2)))
    model.layers[1].weight = model.layers[1].weight * 1e6  # nvfp4's scales end at 448
    report = quiet(model, mode="nvfp4")
    assert any("more than half as large as the weights in layers.1 (0." in note for note in report.notes)


def test_outputs_that_are_worse_than_none_are_in_the_notes_without_an_evaluation(monkeypatch) -> None:
    # Each layer is far off by what stands in for the weights before it, as a correction out of bounds would have it.
    monkeypatch.setattr(gptq_model, "corrected", lambda weight, *_: 20.0 * weight)
    monkeypatch.setattr(gptq_model, "_least", lambda errors: "gptq")
    mx.random.seed(1)
    batches = [mx.random.randint(0, 64, (2, 17)) for _ in range(3)]
    found = []
    for broken in (True, False):
        if not broken:
            monkeypatch.undo()
        report = quiet(toys.llama(dtype=mx.float32), 4, method="gptq", calibration=batches)
        found.append([note for note in report.notes if "more than 2 times their squares" in note])
    assert len(found[0]) == 1
    assert "and judge it with evaluation" in found[0][0]
    assert not found[1]


def test_the_arithmetic_that_judged_is_in_the_report(monkeypatch) -> None:
    monkeypatch.setattr(float32_products, "_rounds_factors", lambda device: True)
    report = quiet(nn.Sequential(nn.Linear(128, 16)))
    assert "ten bits on this device (TF32)" in report.arithmetic
    assert report.to_dict()["arithmetic"] == report.arithmetic
    assert report.arithmetic in str(report)
