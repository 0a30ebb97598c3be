import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.rules import find_routers, matches


def formats(plan: mt.QuantizationPlan) -> dict[str, str]:
    return {layer.path: str(layer.format) for layer in plan.layers}


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
            self.gate = nn.Linear(128, 4, bias=False)
            self.shared_expert_gate = nn.Linear(128, 1, bias=False)
            self.switch_mlp = SwitchGLU(128, 128, 4)
            self.shared_expert = nn.Linear(128, 64)

    model = nn.Sequential(Mixture(), nn.Linear(128, 4))
    sites = WalkedModel(model).sites
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
