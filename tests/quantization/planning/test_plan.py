import json

import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.errors import QuantizationError


def formats(plan: mt.QuantizationPlan) -> dict[str, str]:
    return {layer.path: str(layer.format) for layer in plan.layers}


@pytest.mark.parametrize("options", [{"skip": "layers.2"}, {"overrides": {"layers.2": False}}])
def test_a_module_in_two_places_is_meant_by_either(options: dict) -> None:
    layer = nn.Linear(128, 128)
    model = nn.Sequential(layer, nn.Linear(128, 128), layer)
    assert [x.path for x in mt.plan_quantization(model, 4, 64, **options).layers] == ["layers.1"]


def test_an_error_only_if_nothing_is_left() -> None:
    model = nn.Sequential(nn.Linear(80, 10), nn.Conv2d(3, 8, 3))
    with pytest.raises(QuantizationError, match=r"(?s)nothing left to quantize.*layers\.0 \(Linear\): last axis 80"):
        mt.plan_quantization(model, 4, 64)
    with pytest.raises(QuantizationError, match="no layer with a matrix"):
        mt.plan_quantization(nn.Sequential(nn.ReLU()), 4, 64)


def test_a_bare_layer_cannot_be_replaced_in_place() -> None:
    with pytest.raises(QuantizationError, match=r"wrap it in nn\.Sequential"):
        mt.plan_quantization(nn.Linear(64, 64), 4, 64)


@pytest.mark.parametrize("family", [toys.gemma2, toys.lfm2])
def test_other_families(family) -> None:
    model = family()
    plan = mt.plan_quantization(model, 4, 64)
    assert plan.size_before_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    after = plan.size_after_bytes
    mt.quantize_model(model, 4, 64, method="nearest", progress=False)
    assert after == sum(a.nbytes for a in toys.arrays_of(model).values())


def test_a_mode_that_fixes_bits_and_group() -> None:
    plan = mt.plan_quantization(toys.llama(), mode="mxfp8", overrides={"*embed_tokens": {"bits": 6}})
    found = formats(plan)
    assert found["model.embed_tokens"] == "6 bits, group 64"
    assert found["model.layers.0.self_attn.q_proj"] == "mxfp8"


def test_inputs_are_quantized_where_they_can_be() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64), nn.Embedding(64, 64))
    plan = mt.plan_quantization(model, mode="nvfp4", activations=True)
    assert formats(plan)["layers.0"] == "nvfp4, inputs too"
    assert [x.reason for x in plan.layers[1:]] == [
        "weights only: MLX cannot quantize the inputs of a Linear with a bias",
        "weights only: MLX quantizes the inputs of Linear, not of Embedding",
    ]


def test_to_dict_is_json() -> None:
    plan = mt.plan_quantization(toys.vision(), 4, 64)
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["size_after_bytes"] == plan.size_after_bytes
    assert [x["path"] for x in read["layers"]] == ["wide", "head"]
