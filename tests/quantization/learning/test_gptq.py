import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.formats.affine import dequantize_float32, quantize_affine
from mlx_tune.quantization.formats.modes import AFFINE_BITS
from mlx_tune.quantization.formats.packing import unpack
from mlx_tune.quantization.learning import gptq_model as passes
from mlx_tune.quantization.learning.gptq import output_error, quantize_gptq
from mlx_tune.quantization.learning.gptq_model import gptq_model
from mlx_tune.quantization.methods import install
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel


def correlated_inputs(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) * np.exp(rng.normal(size=columns) * 0.7)
    return mx.array((rng.normal(size=(rows, columns)) @ (np.eye(columns) + 0.3 * mix)).astype(np.float32))


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_outputs_lose_less_than_with_the_best_grid_for_the_weights(bits):
    x = correlated_inputs(512, 128)
    weight = mx.random.normal((32, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    result = quantize_gptq(weight, x.T @ x, bits, 64)
    assert [a.shape for a in result[:3]] == [a.shape for a in mx.quantize(weight, bits=bits, group_size=64)]
    assert result.scales.dtype == result.biases.dtype == mx.bfloat16
    assert int(unpack(result.packed, bits).max().item()) < 2**bits
    assert result.error < 0.8 * result.optimal_error


def test_the_reported_error_is_that_of_the_outputs():
    x = correlated_inputs(300, 64)
    weight = mx.random.normal((8, 64), key=mx.random.key(1))
    result = quantize_gptq(weight, x.T @ x, 3, 32)
    w, a = (np.array(v, dtype=np.float64) for v in (weight, dequantize_float32(*result[:3], 3, 32)))
    inputs = np.array(x, dtype=np.float64)
    expected = np.square(inputs @ (w - a).T).sum() / np.square(inputs @ w.T).sum()
    assert result.error == pytest.approx(expected, rel=1e-3)
    assert output_error(weight, dequantize_float32(*result[:3], 3, 32), x.T @ x) == pytest.approx(expected, rel=1e-3)


def test_no_row_is_worse_than_the_start():
    x = correlated_inputs(40, 64)  # fewer inputs than columns: the moments are singular
    weight = mx.random.normal((64, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    h = x.T @ x
    optimal = quantize_affine(weight, 4, 64)
    result = quantize_gptq(weight, h, 4, 64, start=optimal)

    def by_row(arrays):
        error = weight.astype(mx.float32) - dequantize_float32(*arrays, 4, 64)
        return np.array(((error @ h) * error).sum(-1))

    assert (by_row(result[:3]) <= by_row(optimal) * (1 + 1e-4)).all()


def test_more_effort_finds_less_error():
    x = correlated_inputs(512, 128)
    weight = mx.random.normal((16, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    fast, best = (quantize_gptq(weight, x.T @ x, 3, 64, effort=effort).error for effort in ("fast", "best"))
    assert best < fast


def test_two_weights_with_one_dominant_direction_cancel_their_errors():
    """Where inputs always move together, only the sum of their weights' errors matters."""

    h = mx.ones((32, 32)) + 1e-4 * mx.eye(32)
    weight = mx.random.normal((4, 32), key=mx.random.key(1))
    error = weight - dequantize_float32(*quantize_gptq(weight, h, 3, 32)[:3], 3, 32)
    assert mx.abs(error.sum(-1)).max().item() < 0.02
    assert mx.abs(error).max().item() > 0.05


@pytest.mark.parametrize(
    ("shape", "text"),
    [((64, 32), r"Hessian of shape \[64, 32\]"), ((32, 32), r"Hessian of shape \[32, 32\]")],
)
def test_a_hessian_that_does_not_fit_is_refused(shape, text):
    with pytest.raises(QuantizationError, match=text):
        quantize_gptq(mx.ones((4, 64)), mx.ones(shape), 4, 64)


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        quantize_gptq(mx.ones((4, 64)), mx.full((64, 64), float("nan")), 4, 64)


def test_inputs_that_are_always_zero_leave_the_start():
    weight = mx.random.normal((4, 64), key=mx.random.key(1))
    result = quantize_gptq(weight, mx.zeros((64, 64)), 4, 64)
    assert result.error == 0
    assert mx.array_equal(result.packed, quantize_affine(weight, 4, 64)[0]).item()


def test_experts_are_solved_one_by_one():
    from mlx_lm.models.switch_layers import SwitchGLU

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = SwitchGLU(64, 64, 3)

        def __call__(self, x):
            chosen = (mx.arange(x.shape[0])[:, None] + mx.arange(2)[None]) % 3
            return self.experts(x, chosen).sum(-2)

    mx.random.seed(0)
    model = Routed()
    x = correlated_inputs(8 * 64, 64).reshape(8, 64, 64)
    batches = read_batches(list(x), "calibration")
    layers = plan_quantization(model, 3, 64).layers
    done = gptq_model(WalkedModel(model), layers, batches, install=install, blocks=blocks_of(model))
    assert {layer.path: layer.method for layer in done}["experts.up_proj"] == "gptq"
    assert type(model.experts.up_proj).__name__ == "QuantizedSwitchLinear"


def test_a_layer_keeps_nearest_where_its_outputs_lose_least_with_it(monkeypatch):
    real = passes.pack_weight

    def coarse(weight, wanted, method, *more):
        """Stand in for a search that went wrong."""
        (packed, scales, biases), used = real(weight, wanted, method, *more)
        return (packed, scales * (1.5 if method == "optimal" else 1), biases), used

    monkeypatch.setattr(passes, "pack_weight", coarse)
    monkeypatch.setattr(passes, "quantize_gptq", lambda *_, start, **__: (*start, 0.0, 0.0))
    model = nn.Sequential(nn.Linear(64, 32))
    before = model.layers[0].weight
    batches = read_batches([correlated_inputs(32, 64, seed) for seed in range(4)], "calibration")
    layers = plan_quantization(model, 3, 64).layers
    (done,) = gptq_model(WalkedModel(model), layers, batches, install=install, blocks=blocks_of(model))
    assert done.method == "nearest"
    assert "kept 'nearest': gptq's output error was" in done.note
    assert mx.array_equal(model.layers[0].weight, mx.quantize(before, 64, 3)[0]).item()
