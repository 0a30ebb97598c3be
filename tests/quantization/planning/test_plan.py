import gc
import json

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.models.sites import sites_of
from mlx_tune.quantization.planning.rules import find_routers, matches


def formats(plan: mt.QuantizationPlan) -> dict[str, str]:
    return {layer.path: str(layer.format) for layer in plan.layers}


def test_nothing_is_changed_and_no_weight_is_read(tmp_path) -> None:
    model = toys.llama()
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), toys.arrays_of(model))
    model.load_weights(list(mx.load(str(tmp_path / "weights.safetensors")).items()))
    gc.collect()  # what is left of other tests
    before = mx.get_active_memory()
    plan = mt.plan_quantization(model, 4, 64)
    assert mx.get_active_memory() == before
    assert type(model.model.embed_tokens) is nn.Embedding
    assert len(plan.layers) == 1 + 2 * 7


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_of_the_model_that_results(tied: bool) -> None:
    model = toys.llama(tied=tied)
    plan = mt.plan_quantization(model, 3, 32)
    assert plan.size_before_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    nn.quantize(model, 32, 3)
    after = sum(a.nbytes for a in toys.arrays_of(model).values())
    assert plan.size_after_bytes == after
    assert plan.size_after_bytes == plan.rest_bytes + sum(x.bytes_after for x in plan.layers)
    from mlx_lm.utils import compute_bits_per_weight

    assert plan.bits_per_weight == pytest.approx(compute_bits_per_weight(model))


def test_weights_shared_between_modules_count_once() -> None:
    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96, bias=False))
    model.layers[1].weight = model.layers[0].weight
    plan = mt.plan_quantization(model, 4, 64)
    assert [layer.paths for layer in plan.layers] == [("layers.0", "layers.1")]
    assert plan.size_before_bytes == 96 * 64 * 4
    assert plan.size_after_bytes == 96 * 64 // 2 + 96 * 8
    assert plan.parameters == 96 * 64
    assert "shared with layers.1" in str(plan)


def test_a_module_that_stands_in_two_places_counts_once() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    plan = mt.plan_quantization(model, 4, 64)
    assert [x.paths for x in plan.layers] == [("layers.0", "layers.2")]
    assert plan.size_before_bytes == 64 * 64 * 4 + 64 * 4


@pytest.mark.parametrize(
    "options", [{"skip": "layers.1"}, {"skip": "layers.0"}, {"overrides": {"layers.0": {"bits": 8}}}]
)
def test_a_shared_weight_with_two_fates_counts_twice_afterwards(options: dict) -> None:
    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96, bias=False))
    model.layers[1].weight = model.layers[0].weight
    plan = mt.plan_quantization(model, 4, 64, **options)
    assert plan.size_before_bytes == 96 * 64 * 4
    mt.quantize_model(model, 4, 64, progress=False, **options)
    assert plan.size_after_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    assert "stored apart from layers.0, whose weights it shares now" in str(plan)


@pytest.mark.parametrize("options", [{"skip": "layers.2"}, {"overrides": {"layers.2": False}}])
def test_a_module_in_two_places_is_meant_by_either(options: dict) -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.Linear(64, 64), layer)
    assert [x.path for x in mt.plan_quantization(model, 4, 64, **options).layers] == ["layers.1"]


def test_arrays_in_a_modules_own_lists_are_counted() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)
            self.tables = [mx.zeros((3, 4)), {"deep": mx.zeros(5)}]

    model = nn.Sequential(Loose())
    plan = mt.plan_quantization(model, 4, 64)
    assert plan.size_before_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    assert [(x.path, x.bytes_after) for x in plan.skipped] == [("layers.0", 4 * (12 + 5))]
    assert plan.parameters == 64 * 64 + 64 + 12 + 5


def test_what_does_not_fit_is_skipped_with_its_reason_and_its_cost() -> None:
    plan = mt.plan_quantization(toys.vision(), 4, 64)
    skipped = {layer.path: layer for layer in plan.skipped}
    assert skipped["patch"].reason == "Conv2d has no quantized form in MLX"
    assert skipped["narrow"].reason == "last axis 32 not divisible by 64; 32 would do"
    assert skipped["odd"].reason == (
        "last axis 80 not divisible by 64; no group size of mode 'affine' divides it; mode 'nvfp4', in groups of 16, "
        "would do"
    )
    weights = 80 * 128
    assert skipped["odd"].cost_bytes == weights * 4 - (weights // 2 + weights // 64 * 8)
    assert formats(plan) == {"wide": "4 bits, group 64", "head": "4 bits, group 64"}
    text = str(plan)
    assert "last axis 80 not divisible by 64" in text
    assert "costs 35.0 kB" in text or "costs" in text
    total = sum(x.bytes_after for x in (*plan.layers, *plan.skipped)) + plan.rest_bytes
    assert total == plan.size_after_bytes


def test_an_error_only_if_nothing_is_left() -> None:
    model = nn.Sequential(nn.Linear(80, 10), nn.Conv2d(3, 8, 3))
    with pytest.raises(QuantizationError, match=r"(?s)nothing left to quantize.*layers\.0 \(Linear\): last axis 80"):
        mt.plan_quantization(model, 4, 64)
    with pytest.raises(QuantizationError, match="no layer with a matrix"):
        mt.plan_quantization(nn.Sequential(nn.ReLU()), 4, 64)


def test_a_layer_named_by_hand_must_be_possible() -> None:
    with pytest.raises(QuantizationError, match=r"overrides\['odd'\]: odd cannot be quantized: last axis 80"):
        mt.plan_quantization(toys.vision(), 4, 64, overrides={"odd": {"bits": 8}})
    plan = mt.plan_quantization(toys.vision(), 4, 64, overrides={"*": {"bits": 8, "group_size": 32}})
    assert formats(plan)["narrow"] == "8 bits, group 32"
    assert "odd" not in formats(plan)


def test_overrides_and_skip() -> None:
    plan = mt.plan_quantization(
        toys.llama(tied=False),
        4,
        64,
        overrides={"*.lm_head": {"bits": 8}, "*.v_proj": {"group_size": 32}, "*.0.*.v_proj": False},
        skip=["*.mlp.*"],
    )
    found = formats(plan)
    assert found["lm_head"] == "8 bits, group 64"
    assert found["model.layers.1.self_attn.v_proj"] == "4 bits, group 32"
    reasons = {layer.path: layer.reason for layer in plan.skipped}
    assert reasons["model.layers.0.self_attn.v_proj"] == "overrides['*.0.*.v_proj'] is False"
    assert reasons["model.layers.0.mlp.up_proj"] == "skip='*.mlp.*'"
    assert len(plan.layers) + len(plan.skipped) == 16


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"overrides": {"*.lm_haed": {"bits": 8}}}, r"no layer matches '\*\.lm_haed'. Layers are named like lm_head"),
        ({"skip": "nonsense"}, "skip: no layer matches 'nonsense'"),
        (
            {"skip": "model.layers.0"},
            r"is no layer, but holds some: 'model\.layers\.0\.\*' means all",
        ),
        ({"skip": 3}, "skip=3 must be a pattern or a list of patterns"),
        ({"skip": [3]}, "skip: 3 must be text"),
        ({"overrides": {"lm_head": {"bits": 64, "group_size": 4}}}, "swapped"),
        ({"overrides": {"lm_head": {"bits": 9}}}, r"overrides\['lm_head'\]: bits=9 is not supported"),
        ({"overrides": {"lm_head": {"width": 9}}}, "has 'width': only 'bits', 'group_size' and 'mode'"),
        ({"overrides": {"lm_head": 8}}, "must be a dict of bits"),
        ({"overrides": ["lm_head"]}, "must map patterns to formats"),
        ({"method": "awq"}, "method='awq' is unknown: choose one of nearest, optimal, gptq, dwq"),
        ({"effort": "more"}, "effort='more' is unknown"),
        ({"mode": "mxfp4", "method": "gptq"}, "mode='mxfp4' has neither"),
        ({"activations": True}, "activations=True does not work in mode 'affine'"),
        ({"mode": "mxfp4", "activations": True}, "nvfp4 and mxfp8 only"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict, text: str) -> None:
    with pytest.raises(QuantizationError, match=text):
        mt.plan_quantization(toys.llama(tied=False), 4, 64, **arguments)


def test_not_a_module() -> None:
    with pytest.raises(QuantizationError, match=r"model is a dict, not an mlx.nn.Module"):
        mt.plan_quantization({}, 4, 64)


def test_a_bare_layer_cannot_be_replaced_in_place() -> None:
    with pytest.raises(QuantizationError, match=r"wrap it in nn\.Sequential"):
        mt.plan_quantization(nn.Linear(64, 64), 4, 64)


def test_quantized_already() -> None:
    model = toys.llama()
    nn.quantize(model, 64, 4, class_predicate=lambda path, m: path.endswith("up_proj"))
    with pytest.raises(QuantizationError, match=r"2 of 15 layers.*model\.layers\.0\.mlp\.up_proj.*requantize=True"):
        mt.plan_quantization(model, 4, 64)
    for wanted in ({"bits": 8}, True):  # naming a quantized layer by hand is no permission to quantize it again
        with pytest.raises(QuantizationError, match=r"2 of 15 layers are quantized already"):
            mt.plan_quantization(model, 4, 64, overrides={"model.layers.0.mlp.up_proj": wanted})
    left = mt.plan_quantization(model, 4, 64, skip="*.up_proj")
    assert len(left.layers) == 13
    anew = mt.plan_quantization(model, 3, 64, requantize=True)
    assert len(anew.layers) == 15
    up = next(x for x in anew.layers if x.path.endswith("up_proj"))
    assert up.shape == (128, 64)
    assert up.bytes_before == 128 * 64 // 2 + 2 * 128 * 2
    assert anew.parameters == mt.plan_quantization(toys.llama(), 4, 64).parameters


def test_what_a_model_protects_is_protected_unless_overridden() -> None:
    model = toys.qwen3_moe()
    gate = "model.layers.0.mlp.gate"
    plan = mt.plan_quantization(model, 3, 64)
    assert formats(plan)[gate] == "8 bits, group 64"
    assert "set by the model's quant_predicate" in str(plan)
    assert formats(plan)["model.layers.0.mlp.switch_mlp.up_proj"] == "3 bits, group 64"
    assert formats(mt.plan_quantization(model, 3, 64, overrides={gate: True}))[gate] == "3 bits, group 64"
    assert formats(mt.plan_quantization(model, 3, 64, overrides={gate: {"bits": 2}}))[gate] == "2 bits, group 64"


def test_routers_are_found_without_a_predicate() -> None:
    from mlx_lm.models.switch_layers import SwitchGLU

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(64, 4, bias=False)
            self.shared_expert_gate = nn.Linear(64, 1, bias=False)
            self.switch_mlp = SwitchGLU(64, 64, 4)
            self.shared_expert = nn.Linear(64, 64)

    model = nn.Sequential(Mixture(), nn.Linear(64, 4))
    sites = sites_of(model)
    found = find_routers(sites)
    assert sorted(s.path for s in sites if id(s.module) in found) == ["layers.0.gate", "layers.0.shared_expert_gate"]
    plan = mt.plan_quantization(model, 2, 64)
    assert formats(plan)["layers.0.gate"] == "8 bits, group 64"
    assert formats(plan)["layers.1"] == "2 bits, group 64"
    assert formats(mt.plan_quantization(model, mode="mxfp4"))["layers.0.gate"] == "8 bits, group 64"
    assert formats(mt.plan_quantization(model, 8, 32))["layers.0.gate"] == "8 bits, group 32"  # no worse than the rest


def test_a_predicate_that_says_no() -> None:
    model = toys.llama()
    model.quant_predicate = lambda path, module: not path.endswith("o_proj")
    plan = mt.plan_quantization(model, 4, 64)
    assert {x.reason for x in plan.skipped} == {"protected by the model's quant_predicate"}
    assert len(plan.skipped) == 2


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


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("lm_head", "*.lm_head", True),
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", False),
        ("model.layers.1.mlp.up_proj", "*.layers.[01].*", True),
        ("model.layers.11.mlp", "*.layers.1.*", False),
    ],
)
def test_patterns(path: str, pattern: str, expected: bool) -> None:
    assert matches(path, pattern) is expected


def test_walk_names_every_module_once() -> None:
    model = toys.llama()
    sites = sites_of(model)
    assert len({id(s.module) for s in sites}) == len(sites)
    names = {p for s in sites for p in s.paths}
    assert {name.rpartition(".")[0] for name, _ in tree_flatten(model.parameters())} <= names
