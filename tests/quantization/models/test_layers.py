import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_tune.quantization import quantization_config, quantizes_inputs
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.models.layers import dense_twin, dequantized_weight, quantized_module


def test_layers_that_quantize_their_inputs() -> None:
    layer = nn.Linear(64, 64, bias=False)
    wanted = Format(4, 16, "nvfp4", quantize_input=True)
    packed, scales = mx.quantize(layer.weight, mode="nvfp4")
    made = quantized_module(layer, wanted, (packed, scales, None))
    assert type(made) is nn.QQLinear
    assert made.weight is packed
    assert made.scales is scales
    assert made.training is False
    assert quantizes_inputs(nn.Sequential(made))
    assert quantization_config(nn.Sequential(made)) == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    twin = dense_twin(made, mx.float32)
    assert type(twin) is nn.Linear
    assert mx.abs(twin.weight - layer.weight).max().item() < 0.05


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_a_dense_twin_computes_the_same(mode: str) -> None:
    layer = nn.Linear(128, 32)
    packed = layer.to_quantized(*((32, 8) if mode == "mxfp8" else (64, 4)), mode=mode)
    twin = dense_twin(packed)
    x = mx.random.normal((3, 128))
    assert type(twin) is nn.Linear
    np.testing.assert_allclose(np.array(twin(x)), np.array(packed(x)), rtol=1e-4, atol=1e-4)
    assert dense_twin(layer) is layer
    assert dequantized_weight(packed).dtype == mx.float32


def test_experts_with_a_scale_of_their_own() -> None:
    from mlx_lm.models.switch_layers import SwitchLinear

    layer = SwitchLinear(64, 32, 4, bias=False)
    packed = layer.to_quantized(16, 4, mode="nvfp4", global_scale=True)
    error = mx.abs(dequantized_weight(packed) - layer.weight).max().item()
    assert error < 0.05
    assert type(dense_twin(packed)) is SwitchLinear
