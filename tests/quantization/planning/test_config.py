import mlx.nn as nn
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.quantization import quantization_config


def quiet(model: nn.Module, *args, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, *args, progress=False, **kwargs)


def test_the_config_names_what_differs() -> None:
    model = toys.llama(tied=False)
    quiet(model, 4, 64, overrides={"lm_head": {"bits": 8, "group_size": 32}}, skip="*.0.*.o_proj")
    assert quantization_config(model) == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "lm_head": {"group_size": 32, "bits": 8, "mode": "affine"},
        "model.layers.0.self_attn.o_proj": False,
    }
    assert quantization_config(toys.llama()) == {}


def test_layers_that_know_no_modes_are_described_without_one() -> None:
    from mlx_lm.models.afm7 import FusedLinear

    model = nn.Sequential(FusedLinear(128, [32, 32]), nn.Linear(128, 64))
    quiet(model, 4, 64)
    config = quantization_config(model)
    assert config == {"group_size": 64, "bits": 4, "mode": "affine", "layers.0": {"group_size": 64, "bits": 4}}
    FusedLinear(128, [32, 32]).to_quantized(**config["layers.0"])  # as mlx-lm does when it loads the model
    left = mt.plan_quantization(nn.Sequential(FusedLinear(128, [32, 32]), nn.Linear(128, 64)), mode="mxfp4").skipped
    assert [layer.reason for layer in left] == ["FusedLinear can be quantized in mode 'affine' only"]
