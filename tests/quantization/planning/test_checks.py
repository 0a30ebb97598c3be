import math

import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.errors import BackendError, QuantizationError


def quiet(model: nn.Module, *args, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, *args, progress=False, **kwargs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_found_first(value: float) -> None:
    model = toys.llama()
    layer = model.layers[1].mlp.up_proj
    layer.weight[3, 5] = value
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj \(1 of 32,768 weights\)"):
        quiet(model)
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.cpu_only
def test_activations_are_refused_where_the_backend_cannot() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    with pytest.raises(BackendError, match="cannot quantize a layer's inputs in mode 'nvfp4' on this backend"):
        quiet(model, mode="nvfp4", activations=True)
    assert type(model.layers[0]) is nn.Linear
