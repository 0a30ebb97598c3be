"""A plan that says which format its weights were packed in before."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

import mlx_tune as mt
from mlx_tune.upstream import is_lazy


def unpacked_model(layers: int = 10, *, bits: int = 4, group_size: int = 32) -> nn.Module:
    """Layers that were packed before, and a last one that was not."""
    mx.random.seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(layers)))
    for layer in model.layers[:-1]:
        packed = layer.to_quantized(group_size, bits)
        layer.weight = mx.dequantize(packed.weight, packed.scales, packed.biases, group_size, bits)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def notes(model: nn.Module, bits: int, group_size: int, **options: object) -> list[str]:
    plan = mt.plan_quantization(model, bits, group_size, **options)  # type: ignore[arg-type]
    return [note for note in plan.notes if "grid" in note]


def test_the_lossless_format_is_named() -> None:
    model = unpacked_model()
    text = "The weights lie on a grid already, in 7 of 8 layers that were looked at: 4 bits, group 32, "
    assert notes(model, 4, 32) == [
        f"{text}as this plan has it, holds them without loss by method='optimal'. Not so layers.9."
    ]
    assert notes(model, 4, 64) == [
        f"{text}which this plan does not have, holds them without loss by method='optimal'. Not so layers.9."
    ]
    assert "2 bits, group 64" in notes(unpacked_model(bits=2, group_size=64), 4, 64)[0]


def test_weights_on_no_grid_and_packed_ones_have_no_such_note() -> None:
    assert notes(unpacked_model(1), 4, 32) == []
    model = unpacked_model()
    nn.quantize(model, 32, 4)
    assert notes(model, 4, 32, requantize=True) == []


def test_of_weights_on_disk_three_layers_are_read_and_none_is_kept(tmp_path: Path) -> None:
    model, file = unpacked_model(), str(tmp_path / "w.safetensors")
    model.save_weights(file)
    model.load_weights(file)
    assert "in 2 of 3 layers that were looked at" in notes(model, 4, 32)[0]
    assert all(is_lazy(layer.weight) for layer in model.layers)


def test_the_report_says_what_was_recovered() -> None:
    report = mt.quantize_model(unpacked_model(), 4, 32, progress=False)
    assert [layer.reason for layer in report.layers] == ["recovered"] * 9 + [None]
    assert any("Recovered: the weights of 9 of 10 layers lay on a grid already" in note for note in report.notes)
    finer = mt.quantize_model(unpacked_model(), 4, 64, progress=False)
    assert not any("ecovered" in note for note in finer.notes)
    calibration = [mx.random.normal((8, 128), key=mx.random.key(i)) for i in range(4)]
    learned = mt.quantize_model(unpacked_model(), 4, 32, method="gptq", calibration=calibration, progress=False)
    assert sum(layer.reason is not None and "recovered" in layer.reason for layer in learned.layers) == 9
