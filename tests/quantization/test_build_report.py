import mlx.nn as nn

import mlx_tune as mt


def quiet(model: nn.Module, *args, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, *args, progress=False, **kwargs)


def test_weights_out_of_a_modes_range_are_in_the_notes() -> None:
    model = nn.Sequential(*(nn.Linear(128, 16, bias=False) for _ in range(2)))
    model.layers[1].weight = model.layers[1].weight * 1e6  # nvfp4's scales end at 448
    report = quiet(model, mode="nvfp4")
    assert any("more than half as large as the weights in layers.1 (0." in note for note in report.notes)
