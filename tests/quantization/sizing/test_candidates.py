import mlx.nn as nn
import quantization_toys as toys

import mlx_tune as mt


def planned(model: nn.Module, **kwargs) -> mt.QuantizationPlan:
    return mt.plan_quantization(model, 4, 64, **{"method": "nearest", **kwargs})


def test_overrides_and_protected_layers_are_not_up_for_choice() -> None:
    model = toys.qwen3_moe()
    plan = planned(
        model, target_bpw=5.6, overrides={"lm_head": {"bits": 8}, "*.q_proj": False, "*.k_proj": {"bits": 2}}
    )
    found = {layer.path: layer for layer in plan.layers}
    assert str(found["lm_head"].format) == "8 bits, group 64"
    assert found["model.layers.0.mlp.gate"].bits == 8
    assert found["model.layers.0.self_attn.k_proj"].bits == 2
    assert "model.layers.0.self_attn.q_proj" in {x.path for x in plan.skipped}
    assert plan.bits_per_weight <= 5.6
