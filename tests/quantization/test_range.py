"""Weights at the edges of what their dtype, and that of their scales, can hold."""

import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.quantize import quantize_model


def two_layers(weight: mx.array) -> nn.Module:
    """One of that weight, and an ordinary one."""
    made = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    made.layers[0].weight = weight
    made.layers[1].weight = (0.1 * mx.random.normal((64, 64), key=mx.random.key(1))).astype(weight.dtype)
    return made


ORDINARY = mx.random.uniform(-1, 1, (64, 64), key=mx.random.key(0))
CALIBRATION = [mx.random.normal((4, 64), key=mx.random.key(i)) for i in range(3)]


@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**50])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("arguments", [
    {"bits": 1}, {"bits": 4}, {"bits": 8}, {"mode": "mxfp4"}, {"mode": "mxfp8"},
    {"bits": 3, "method": "gptq"}, {"bits": 3, "method": "dwq"}, {"target_bpw": 5.0},
], ids=str)  # fmt: skip
def test_a_layer_loses_as_little_at_any_magnitude(arguments: dict, dtype: mx.Dtype, magnitude: float) -> None:
    calibration = CALIBRATION if "method" in arguments else None
    plain, found = (
        quantize_model(two_layers(weight.astype(dtype)), **arguments, calibration=calibration, progress=False)
        for weight in (ORDINARY, ORDINARY * magnitude)
    )
    assert found.layers[0].snr_db > plain.layers[0].snr_db - 0.5


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("method", ["nearest", "optimal"])
@pytest.mark.parametrize("magnitude", [1e-40, 1e-38, 1e38, 3.3e38])
def test_modes_of_floats_give_decibels_at_the_edges(mode: str, method: str, magnitude: float) -> None:
    report = quantize_model(two_layers(ORDINARY * magnitude), mode=mode, method=method, progress=False)
    assert not math.isnan(report.layers[0].snr_db)
    assert method == "nearest" or report.layers[0].snr_db >= 0


def test_inputs_that_overflow_name_their_layer() -> None:
    with pytest.raises(QuantizationError, match=r"layers\.1 was given calibration inputs .* whose squares are not"):
        quantize_model(two_layers(1e30 * ORDINARY), method="gptq", calibration=CALIBRATION, progress=False)
