import math

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune.quantization.sizing.target as target
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.quantize import quantize_model


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
