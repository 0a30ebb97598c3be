"""Layers and experts that calibration does not reach, or hardly."""

import math

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune.quantization.sizing.target as target
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.learning.experts import note_of_experts
from mlx_tune.quantization.learning.moments import InputMoments, count_experts
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.quantize import quantize_model
from mlx_tune.quantization.sizing.coverage import Coverage, measure_coverage


class Block(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(nn.silu(self.up(x)))


class Model(nn.Module):
    """Two blocks, and one that some ways of calling leave out, as a draft head, an adapter or another modality is."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.layers = [Block() for _ in range(2)]
        self.extra = Block()
        self.lm_head = nn.Linear(64, 96, bias=False)
        self._extra = extra

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        if self._extra == "hardly":  # the first token alone, of the first sequence
            first = mx.concatenate([self.extra(x[:1, :1]), x[:1, 1:]], axis=1)
            x = mx.concatenate([first, x[1:]])
        elif self._extra == "without effect":
            x = x + 0 * self.extra(x)
        return self.lm_head(x)


def made(extra: str) -> Model:
    mx.random.seed(3)
    model = Model(extra)
    mx.eval(model.parameters())
    return model


CALIBRATION = [toys.tokens(4, 33, seed=i) for i in range(4)]
WHY = {
    "left out": "no calibration reached it",
    "hardly": "too little calibration reached it",
    "without effect": "its sensitivity could not be measured",
}


@pytest.mark.parametrize("extra", WHY)
@pytest.mark.parametrize("bpw", [3.6, 4.5, 6.0])
def test_what_calibration_says_nothing_of_is_as_wide_as_most_and_named(extra: str, bpw: float) -> None:
    report = quantize_model(made(extra), target_bpw=bpw, calibration=CALIBRATION, progress=False)
    bits = {layer.path: layer.bits for layer in report.layers} | {layer.path: 16 for layer in report.skipped}
    seen = [width for path, width in bits.items() if not path.startswith("extra")]
    common = max(set(seen), key=lambda width: (seen.count(width), width))
    assert min(bits["extra.up"], bits["extra.down"]) >= common
    assert report.bits_per_weight <= bpw
    assert any("Calibration says nothing of extra." in note for note in report.notes)
    rows = {layer.path: layer.reason for layer in (*report.layers, *report.skipped)}
    assert all(WHY[extra] in (rows[path] or "") for path in ("extra.up", "extra.down"))
    assert all("calibration" not in (rows[path] or "") for path in rows if not path.startswith("extra"))


def test_a_sensitivity_that_is_no_number_counts_as_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = target.measure_divergences

    def broken(*arguments, **keywords):
        return measure(*arguments, **keywords) | {"layers.0.up": (math.nan, 0.01), "lm_head": (math.inf, 0.01)}

    monkeypatch.setattr(target, "measure_divergences", broken)
    plan = plan_quantization(made("left out"), target_bpw=4.5, calibration=CALIBRATION)
    rows = {layer.path: layer.reason for layer in (*plan.layers, *plan.skipped)}
    assert "could not be measured" in rows["layers.0.up"]
    assert "could not be measured" in rows["lm_head"]


def test_the_row_says_so_for_methods_that_learn() -> None:
    for method in ("gptq", "dwq"):
        report = quantize_model(made("left out"), 3, 64, method=method, calibration=CALIBRATION, progress=False)
        rows = {layer.path: layer.reason for layer in report.layers}
        assert "no calibration input reached it" in rows["extra.up"]


def test_reach_is_what_layers_are_given() -> None:
    model = toys.qwen3_moe()
    layers = plan_quantization(model).layers
    found = measure_coverage(model, layers, read_batches([toys.tokens(2, 17), toys.tokens(1, 9)], "calibration"))
    tokens = 2 * 16 + 8
    assert found["model.embed_tokens"] == found["lm_head"] == Coverage(tokens)
    stack = found["model.layers.0.mlp.switch_mlp.up_proj"]
    assert stack.experts is not None
    assert stack.inputs == sum(stack.experts) == 2 * tokens  # two experts a token
    assert len(stack.experts) == 8


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        (Coverage(0), False), (Coverage(31), False), (Coverage(32), True), (Coverage(100, (50, 50, 0, 0)), False),
        (Coverage(100, (50, 40, 33, 1)), True), (Coverage(4, (1, 1, 1, 1)), False),
    ],
)  # fmt: skip
def test_enough_is_some_dozen_inputs_and_half_of_the_experts(reach: Coverage, expected: bool) -> None:
    assert reach.enough(most=1000) is expected


def test_of_few_inputs_altogether_few_are_enough() -> None:
    assert Coverage(4).enough(most=4)


def test_experts_that_were_not_reached_are_named_and_shrunk_by_their_own_count(monkeypatch) -> None:
    import mlx_tune.quantization.learning.gptq_model as passes

    seen: list[int] = []
    shrinkage_for = passes.shrinkage_for
    monkeypatch.setattr(
        passes, "shrinkage_for", lambda columns, tokens: seen.append(tokens) or shrinkage_for(columns, tokens)
    )
    model = toys.qwen3_moe()
    gate, direction = model.model.layers[0].mlp.gate, mx.random.normal((1, 64), key=mx.random.key(1))
    gate.weight = mx.concatenate([s * direction for s in (1, -1, 0.9, -0.9, 0.001, -0.001, 0, 0)])
    report = quantize_model(
        model, 3, 64, method="gptq", calibration=CALIBRATION, overrides={"*.gate": False}, progress=False
    )
    reason = {layer.path: layer.reason for layer in report.layers}["model.layers.0.mlp.switch_mlp.up_proj"]
    assert "no calibration input reached experts 4, 5, 6, 7 of 8" in reason
    assert seen.count(0) == 3 * 4  # three stacks, four experts each


def test_moments_count_each_experts_inputs() -> None:
    assert count_experts(mx.array([[0, 3], [3, 3]]), 4) == [1, 0, 0, 3]
    assert InputMoments({"a": nn.Linear(4, 4)}).experts_of("a") is None


def test_many_experts_are_named_in_part() -> None:
    assert note_of_experts([0] * 10 + [99] * 6) == (
        "no calibration input reached experts 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of 16"
    )
    assert note_of_experts([99, 3]) == "few calibration inputs reached expert 1 (3)"
    assert note_of_experts([99, 98]) is None
