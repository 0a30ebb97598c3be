from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from planted_kernels import garbage, nan, wrong_at_width_128_from_two_rows
from quantization_toys import llama, qwen3_moe

import mlx_tune as mt
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.faulty_kernels import ties_embeddings, unpack_faulty, uses_of


def missing(result, arrays, parts):
    raise RuntimeError("[quantized_matmul] No implementation for problem shape: 8x32x64x1.")


def test_layers_of_a_width_that_is_wrong_stay_unpacked_with_their_reason(plant):
    plant(multiply=wrong_at_width_128_from_two_rows)
    plan = mt.plan_quantization(llama(), 4)
    narrow = {layer.path: layer for layer in plan.skipped}
    assert all(layer.shape[-1] == 128 for layer in narrow.values())
    assert all(layer.shape[-1] == 256 for layer in plan.layers)
    assert narrow["model.embed_tokens"].reason == "MLX computes it wrong here (product, 128 inputs, 8 rows)"
    assert all(layer.cost_bytes == layer.bytes_before * 23 // 32 for layer in narrow.values())
    (note,) = [note for note in plan.notes if "Warning" in note]
    assert "product of 128 inputs in 4 bits, group 64, bfloat16 at 8 rows is wrong" in note
    assert f"{len(narrow)} layers were left unpacked" in note
    assert "verify_kernels=False" in note


def test_the_model_and_the_report_are_as_the_plan_said(plant):
    plant(multiply=wrong_at_width_128_from_two_rows)
    model, tokens = llama(), mx.array([[1, 2, 3, 4]])
    plan = mt.plan_quantization(model, 4)
    report = mt.quantize_model(model, 4, progress=False)
    assert [layer.path for layer in report.skipped] == [layer.path for layer in plan.skipped]
    assert report.size_after_bytes == plan.size_after_bytes
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.QuantizedLinear)
    assert mx.isfinite(model(tokens)).all()
    assert any("left unpacked" in note for note in report.notes)
    assert report.skipped[0].reason in str(report)
    assert report.to_dict()["skipped"][0]["reason"] == plan.skipped[0].reason


def test_three_bits_at_the_same_width_are_packed(plant):
    plant(multiply=wrong_at_width_128_from_two_rows)
    assert not mt.plan_quantization(llama(), 3).skipped


@pytest.mark.parametrize("spoil", [nan, missing])
def test_where_no_layer_can_be_packed_the_call_refuses_and_changes_nothing(plant, spoil):
    plant(multiply=spoil)
    model = llama()
    before = {id(module) for _, module in model.named_modules()}
    with pytest.raises(mt.BackendError, match="No layer can be packed as asked") as caught:
        mt.quantize_model(model, 4, progress=False)
    assert "verify_kernels=False" in str(caught.value)
    assert ("No implementation for problem shape" in str(caught.value)) is (spoil is missing)
    assert {id(module) for _, module in model.named_modules()} == before


def test_experts_that_are_gathered_wrong_stay_unpacked(plant):
    plant(gather=garbage)
    plan = mt.plan_quantization(qwen3_moe(), 4)
    assert {layer.kind for layer in plan.skipped} == {"SwitchLinear"}
    assert all("gathered" in layer.reason for layer in plan.skipped)
    assert {layer.kind for layer in plan.layers} == {"Linear", "Embedding"}


def test_only_rows_in_order_may_be_wrong(plant):
    plant(gather=lambda result, arrays, parts: garbage(result) if parts["sorted_indices"] else result)
    plan = mt.plan_quantization(qwen3_moe(), 4)
    assert {layer.kind for layer in plan.skipped} == {"SwitchLinear"}
    assert plan.skipped[0].reason.endswith("8 rows in order)")


def test_embeddings_that_are_unpacked_wrong_stay_as_they_are(plant):
    plant(dequantize=nan)
    for model in (llama(), llama(tied=False)):
        plan = mt.plan_quantization(model, 4)
        assert [layer.kind for layer in plan.skipped] == ["Embedding"]


def test_a_layer_named_by_hand_is_left_unpacked_too(plant):
    plant(multiply=wrong_at_width_128_from_two_rows)
    plan = mt.plan_quantization(llama(), 3, overrides={"*.q_proj": {"bits": 8}})
    assert [layer.path for layer in plan.skipped] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_a_quantized_model_gets_its_wrong_layers_unpacked(plant):
    model, twin = llama(), llama()
    for each in (model, twin):
        nn.quantize(each, 64, 4)
    plant(multiply=wrong_at_width_128_from_two_rows)
    (note,) = unpack_faulty(model)
    assert "8 rows is wrong" in note
    assert "were unpacked for it" in note
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.QuantizedLinear)
    tokens = mx.array([[5, 6, 7]])
    ours, theirs = model(tokens).astype(mx.float32), twin(tokens).astype(mx.float32)
    assert mx.abs(ours - theirs).max() < 0.05 * mx.abs(theirs).max()
    assert model.trainable_parameters().keys() == twin.trainable_parameters().keys()


def test_a_quantized_model_that_is_right_is_left_alone(plant):
    planted, model = plant(), llama()
    nn.quantize(model, 64, 4)
    before = [id(module) for _, module in model.named_modules()]
    assert unpack_faulty(model) == ()
    assert [id(module) for _, module in model.named_modules()] == before
    assert planted.calls == {"dequantize": 1, "multiply": 4}


def test_a_packed_layer_without_an_unpacked_class_is_named(plant):
    class Packed(nn.QuantizedLinear):
        pass

    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scales, self.biases = mx.quantize(mx.ones((8, 64)))
            self.bits, self.group_size, self.mode = 4, 64, "affine"

    plant(multiply=nan)
    model = nn.Sequential(Packed(64, 8), Unknown())
    unpacked, stuck = unpack_faulty(model)
    assert "1 layer was unpacked" in unpacked
    assert "1 layer was left packed" in stuck
    assert type(model.layers[0]) is nn.Linear
    assert type(model.layers[1]) is Unknown


def test_what_layers_do_with_their_weights():
    experts = qwen3_moe().model.layers[0].mlp.switch_mlp.up_proj
    assert uses_of(experts, tied=False) == ("gathered",)
    assert uses_of(experts.to_quantized(64, 4), tied=False) == ("gathered",)
    assert uses_of(nn.Embedding(8, 64), tied=False) == ("lookup",)
    assert uses_of(nn.Embedding(8, 64).to_quantized(), tied=True) == ("lookup", "product")

    from mlx_lm.models.mla import MultiLinear

    assert uses_of(MultiLinear(64, 32, 4), tied=True) == ("batched",)


def test_tied_embeddings_are_known_from_code_and_configuration():
    assert ties_embeddings(WalkedModel(llama()))
    assert not ties_embeddings(WalkedModel(llama(tied=False)))
    assert not ties_embeddings(WalkedModel(nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))))
