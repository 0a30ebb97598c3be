from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

import mlx_tune as mt
from mlx_tune import lm


def trainable(model) -> list[str]:
    return [name for name, _ in tree_flatten(model.trainable_parameters())]


@pytest.mark.parametrize(("kind", "layer"), [("lora", LoRALinear), ("dora", DoRALinear)])
def test_the_last_blocks_get_adapters(toy, kind: str, layer: type) -> None:
    model = lm.add_adapters(toy(), kind, num_layers=2, lora_parameters={"rank": 3})
    assert not any(isinstance(module, layer) for module in model.layers[0].modules())
    assert all(isinstance(block.mlp.up_proj, layer) for block in model.layers[1:])
    assert model.layers[2].mlp.up_proj.lora_a.shape == (64, 3)
    assert all("layers.0." not in name for name in trainable(model))


def test_experts_get_adapters_too(toy) -> None:
    model = lm.add_adapters(toy("moe"), "lora", num_layers=-1)
    assert isinstance(model.layers[0].mlp.switch_mlp.up_proj, LoRASwitchLinear)


def test_full_trains_all_of_the_last_blocks(toy) -> None:
    model = lm.add_adapters(toy(), "full", num_layers=1)
    assert {name.split(".")[2] for name in trainable(model)} == {"2"}
    assert "model.layers.2.mlp.up_proj.weight" in trainable(model)


def test_full_leaves_the_codes_of_a_quantized_model(toy) -> None:
    model = toy()
    nn.quantize(model, 64, 4)
    lm.add_adapters(model, "full", num_layers=-1)
    names = trainable(model)
    assert "model.layers.0.mlp.up_proj.scales" in names
    assert all(value.dtype != mx.uint32 for _, value in tree_flatten(model.trainable_parameters()))


@pytest.mark.parametrize(
    ("kind", "layers", "text"),
    [
        ("qlora", 1, "fine_tune_type='qlora': it is one of lora, dora, full"),
        ("lora", 4, "num_layers=4: the model has 3 blocks"),
        ("lora", 0, "num_layers=0"),
        ("lora", -2, "num_layers=-2"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(toy, kind: str, layers: int, text: str) -> None:
    model = toy()
    before = trainable(model)
    with pytest.raises(mt.InvalidArgumentError, match=text):
        lm.add_adapters(model, kind, num_layers=layers)
    assert trainable(model) == before


def test_optimizers_go_by_mlx_lms_names() -> None:
    assert isinstance(lm.make_optimizer("adamw", 1e-3, {"weight_decay": 0.5}), optim.AdamW)
    assert isinstance(lm.make_optimizer("sgd", optim.cosine_decay(1e-3, 10)), optim.SGD)
    with pytest.raises(mt.InvalidArgumentError, match="optimizer='lion': it is one of adam,"):
        lm.make_optimizer("lion")
    with pytest.raises(mt.InvalidArgumentError, match=r"cannot be made with \{'speed': 1\}"):
        lm.make_optimizer("sgd", 1e-3, {"speed": 1})
