import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.quantization.judging.accuracy import LanguageAccuracy, LossAccuracy, OutputAccuracy


def test_it_says_what_was_done(report: mt.QuantizationReport) -> None:
    text = str(report)
    assert "Quantization report (optimal, measured)" in text
    assert "model.layers.1.mlp.down_proj" in text
    assert "skip='*.1.mlp.down_proj'" in text
    assert f"bits per weight 16.000 -> {report.bits_per_weight:.3f}" in text
    assert "Speed on this machine" in text
    assert len(report.layers) == 15
    assert [x.path for x in report.skipped] == ["model.layers.1.mlp.down_proj"]
    assert f"bits per weight 16.000 -> {report.bits_per_weight:.3f}, 15 layers by optimal, 1 left" in report.summary()
    assert "same next token" in report.summary()


def test_rows_add_up_to_the_total(report: mt.QuantizationReport) -> None:
    rows = (*report.layers, *report.skipped)
    assert sum(x.bytes_after for x in rows) + report.rest_bytes == report.size_after_bytes
    assert report.bits_per_weight == 8 * report.size_after_bytes / report.parameters


def test_accuracy_and_speed_are_there(report: mt.QuantizationReport) -> None:
    found = report.accuracy
    assert isinstance(found, LanguageAccuracy)
    assert found.tokens == 2 * 4 * 16
    assert found.sequences == 8
    assert 0 < found.mean_kl < found.p99_kl <= found.max_kl
    assert 0 < found.noise_floor < found.mean_kl
    assert report.speed.before.prefill_tokens == 17
    assert report.speed.after.decode_seconds > 0


def test_learning_from_the_evaluation_is_noticed(report: mt.QuantizationReport) -> None:
    assert "50.0 % of the evaluation's text is in the calibration too" in report.accuracy.warnings[0]


def test_json(report: mt.QuantizationReport) -> None:
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["bits_per_weight"] == report.bits_per_weight
    assert read["accuracy"]["kind"] == "tokens"
    assert len(read["accuracy"]["buckets"]) == 6
    assert read["speed"]["before"]["prefill_tokens"] == 17


def test_lossless_layers() -> None:
    model = nn.Sequential(nn.Linear(128, 4, bias=False))
    model.layers[0].weight = mx.arange(512).reshape(4, 128) % 16 * 0.5
    report = mt.quantize_model(model, 4, 64, progress=False)
    assert report.layers[0].snr_db == math.inf
    assert "lossless" in str(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["layers"][0]["lossless"] is True
    above, _ = report.plot().axes
    assert [(line.get_label(), *line.get_ydata()) for line in above.lines] == [("layers", 0.0)]


def test_outputs_of_a_model_without_logits() -> None:
    model = toys.vision()
    report = mt.quantize_model(model, 8, 64, evaluation=[mx.ones((2, 8, 8, 3))], progress=False)
    found = report.accuracy
    assert isinstance(found, OutputAccuracy)
    assert 0 < found.relative_error < 0.02
    assert found.cosine > 0.999
    assert "Accuracy of outputs" in str(report)
    assert report.speed.before.decode_seconds is None


def test_a_given_loss() -> None:
    def loss(model: nn.Module, x: mx.array, y: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(x), y)

    batches = [(mx.random.normal((4, 8, 8, 3), key=mx.random.key(i)), mx.arange(4)) for i in range(3)]
    model = toys.vision()
    expected = sum(loss(model, *b).mean().item() for b in batches) / 3
    report = mt.quantize_model(model, 3, 64, evaluation=batches, loss=loss, progress=False)
    found = report.accuracy
    assert isinstance(found, LossAccuracy)
    assert found.loss_before == pytest.approx(expected, rel=1e-5)
    after = sum(loss(model, *b).mean().item() for b in batches) / 3
    assert found.loss_after == pytest.approx(after, rel=1e-3)
    assert found.loss_change == pytest.approx(found.loss_after - found.loss_before)
    assert "given loss" in str(report)


def test_what_was_given_for_nothing_is_in_the_notes() -> None:
    report = mt.quantize_model(
        toys.vision(), 4, 64, method="nearest", calibration=[mx.ones((2, 8, 8, 3))], progress=False
    )
    assert "The calibration was not used: method='nearest' looks at the weights alone." in report.notes


@pytest.mark.cpu_only
def test_speed_that_cannot_be_measured_is_in_the_notes() -> None:
    model, reference = toys.qwen3_moe(), toys.qwen3_moe()
    for either in (model, reference):
        either.set_dtype(mx.bfloat16)
    report = mt.quantize_model(model, 4, 64, evaluation=[toys.tokens()], progress=False)
    assert report.speed is None
    assert report.accuracy.mean_kl > 0
    assert any("Speed was not measured: MLX cannot run the model here" in note for note in report.notes)
    again = mt.quantization_report(model, reference, [toys.tokens()])
    assert again.speed is None
    assert again.notes == tuple(note for note in report.notes if "Speed" in note)


def test_without_evaluation_nothing_is_claimed() -> None:
    report = mt.quantize_model(toys.vision(), 4, 64, progress=False)
    assert report.accuracy is None
    assert report.speed is None
    assert "Accuracy" not in str(report)
    assert report.to_dict()["accuracy"] is None
