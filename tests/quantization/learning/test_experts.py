import mlx.core as mx
import quantization_toys as toys

from mlx_tune.quantization.learning.experts import note_of_experts
from mlx_tune.quantization.quantize import quantize_model

CALIBRATION = [toys.tokens(4, 33, seed=i) for i in range(4)]


def test_experts_that_were_not_reached_are_named_and_shrunk_by_their_own_count(monkeypatch) -> None:
    import mlx_tune.quantization.learning.gptq_model as passes

    seen: list[int] = []
    shrinkage_for = passes.shrinkage_for
    monkeypatch.setattr(
        passes, "shrinkage_for", lambda columns, tokens: seen.append(tokens) or shrinkage_for(columns, tokens)
    )
    model = toys.qwen3_moe()
    gate, direction = model.model.layers[0].mlp.gate, mx.random.normal((1, 128), key=mx.random.key(1))
    gate.weight = mx.concatenate([s * direction for s in (1, -1, 0.9, -0.9, 0.001, -0.001, 0, 0)])
    report = quantize_model(
        model, 3, 64, method="gptq", calibration=CALIBRATION, overrides={"*.gate": False}, progress=False
    )
    reason = {layer.path: layer.reason for layer in report.layers}["model.layers.0.mlp.switch_mlp.up_proj"]
    assert "no calibration input reached experts 4, 5, 6, 7 of 8" in reason
    assert seen.count(0) == 3 * 4  # three stacks, four experts each


def test_many_experts_are_named_in_part() -> None:
    assert note_of_experts([0] * 10 + [99] * 6) == (
        "no calibration input reached experts 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of 16"
    )
    assert note_of_experts([99, 3]) == "few calibration inputs reached expert 1 (3)"
    assert note_of_experts([99, 98]) is None
