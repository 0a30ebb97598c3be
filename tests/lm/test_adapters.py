from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.trainer import TrainingArgs

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


def held(model) -> dict[str, tuple[int, object]]:
    return {path: (id(array), array.tolist()) for path, array in tree_flatten(model.parameters())}


@pytest.mark.parametrize(("name", "kind"), [("tied", "lora"), ("tied", "dora"), ("moe", "lora")])
@pytest.mark.parametrize("bits", [None, 4])
def test_new_adapters_are_put_to_the_test_and_are_zero_again(toy, rows, name: str, kind: str, bits: int | None) -> None:
    model = toy(name)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    lm.add_adapters(model, kind, num_layers=-1)
    mx.eval(model.parameters())
    before = held(model)
    mx.random.seed(3)
    report = lm.verify_checkpoint(model, rows, TrainingArgs(batch_size=2, max_seq_length=32))
    assert report.ok, report
    assert mx.random.state[0].tolist() == [0, 3]
    assert held(model) == before
    tested = {p.path for p in report.parameters if p.ok}
    zeros = [path for path in before if path.endswith("lora_b")]
    assert tested >= {path.replace("lora_b", "lora_a") for path in zeros if "switch" not in path}
    assert report.notes == (
        f"{len(zeros)} adapter parameters that are zero had small values for the comparison, and are zero again.",
    )
    assert report.notes[0] in str(report)


def test_a_trained_adapter_is_compared_as_it_is(toy, rows) -> None:
    model = lm.add_adapters(toy(), "lora", num_layers=-1)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_b = mx.full(module.lora_b.shape, 0.01)
    report = lm.verify_checkpoint(model, rows, TrainingArgs(batch_size=2, max_seq_length=32))
    assert report.ok
    assert report.notes == ()


def test_a_comparison_that_fails_leaves_the_zeros(toy, rows) -> None:
    model = lm.add_adapters(toy(), "lora", num_layers=-1)
    mx.eval(model.parameters())
    before = held(model)

    def failing(model, batch, lengths):
        assert model.layers[0].self_attn.q_proj.lora_b.any().item()
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        lm.verify_checkpoint(model, rows, TrainingArgs(batch_size=2, max_seq_length=32), loss=failing)
    assert held(model) == before
