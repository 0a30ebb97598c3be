import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.judging.accuracy import divergence_of
from mlx_tune.quantization.judging.evaluation import Watched
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.sizing.sensitivity import measure_divergences


def calibration(count: int = 4) -> list[mx.array]:
    return [toys.tokens(2, 17, seed=i) for i in range(count)]


def test_measured_divergence_is_that_of_the_layer_alone() -> None:
    model = toys.llama(tied=False)
    plan = mt.plan_quantization(model, 2, 64, method="nearest")
    with Watched(WalkedModel(model), read_batches(calibration(1), "calibration")) as divergence:
        found = measure_divergences(
            plan.layers[:2], lambda layer: Format(2, 64), lambda _: divergence(), method="nearest"
        )
    for layer in plan.layers[:2]:
        other = toys.llama(tied=False)
        report = mt.quantize_model(
            other, 2, 64, method="nearest", overrides={"*": False, layer.path: True}, evaluation=calibration(1),
            progress=False,
        )  # fmt: skip
        moved, error = found[layer.path]
        assert moved == pytest.approx(divergence_of(report.accuracy), rel=1e-4)
        assert error == pytest.approx(10 ** (-report.layers[0].snr_db / 10), rel=1e-4)
    assert type(model.model.embed_tokens) is nn.Embedding
