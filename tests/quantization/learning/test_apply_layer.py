from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from outlier_model import VOCABULARY, Outliers, tokens

import mlx_tune as mt


class Averaging(nn.Module):
    """Layers whose inputs all but move together: outputs then depend on the sums of a row's errors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 128)
        self.embed.weight = 1 + 0.01 * self.embed.weight
        self.layers = [nn.Linear(128, 2, bias=False) for _ in range(16)]

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        return sum(layer(x) for layer in self.layers)  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_calibration_no_layer_s_outputs_are_worse_than_rounded_ones(bits: int) -> None:
    mx.random.seed(0)
    batches = [tokens(1), tokens(2)]
    plain, ours, theirs = Averaging(), Averaging(), Averaging()
    for model in (ours, theirs):
        model.update(plain.parameters())
    report = mt.quantize_model(ours, bits, 64, calibration=batches, progress=False)
    mt.quantize_model(theirs, bits, 64, method="nearest", progress=False)
    x = plain.embed(mx.concatenate(batches)[:, :-1])

    def error(layer: nn.Module, before: nn.Module) -> float:
        return (mx.square(layer(x) - before(x)).sum() / mx.square(before(x)).sum()).item()  # type: ignore[no-any-return]

    rows = {row.path: row for row in report.layers}
    for i, (a, b, before) in enumerate(zip(ours.layers, theirs.layers, plain.layers, strict=True)):
        row = rows[f"layers.{i}"]
        assert error(a, before) <= error(b, before) * 1.02
        assert row.output_error == pytest.approx(error(a, before), rel=0.05)
        assert (row.method == "nearest") == ("kept 'nearest'" in (row.reason or ""))
        assert row.output_error <= row.optimal_output_error  # type: ignore[operator]
    if bits >= 4:  # the search was the better one for some layers only, so that both ways were gone
        assert {"nearest", "optimal"} == {rows[f"layers.{i}"].method for i in range(16)}


def test_without_calibration_outputs_are_not_known() -> None:
    report = mt.quantize_model(Outliers(), 4, 64, progress=False)
    assert {row.output_error for row in report.layers} == {None}
    assert {row.method for row in report.layers} == {"optimal"}
