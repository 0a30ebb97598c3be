import mlx.core as mx
import mlx.nn as nn
import pytest
from distilled_models import pair_of_models
from mlx.utils import tree_flatten

from mlx_tune.quantization.formats.packing import dequantize_float32
from mlx_tune.quantization.learning.trainable import stored_pair, trainable_sites, trained_in_place
from mlx_tune.quantization.models.sites import WalkedModel


def test_before_training_the_layers_compute_what_the_quantized_ones_stand_for():
    model, _ = pair_of_models()
    tokens = mx.array([[1, 2, 3]])
    x = mx.random.normal((2, 64), key=mx.random.key(1))
    sites = trainable_sites(WalkedModel(model))
    assert [site.path for site in sites] == ["embed", *(f"layers.{i}.{n}" for i in (0, 1) for n in ("one", "two"))]
    old = model.embed, model.layers[0].one
    weights = [dequantize_float32(m.weight, m.scales, m.biases, m.bits, m.group_size) for m in old]
    with trained_in_place(sites, mx.float32):
        assert mx.allclose(model.embed(tokens), weights[0][tokens], atol=1e-6).item()
        assert mx.allclose(model.embed.as_linear(x), x @ weights[0].T, atol=1e-4).item()
        assert mx.allclose(model.layers[0].one(x), x @ weights[1].T + old[1].bias, atol=1e-4).item()
        names = dict(tree_flatten(model.layers[0].one.parameters()))
        assert sorted(names) == ["bias", "shift", "stretch"]
    assert (model.embed, model.layers[0].one) == old


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_trained_numbers_are_in_quantization_steps(bits):
    layer = nn.QuantizedLinear(64, 4, bias=False, group_size=64, bits=bits)
    model = nn.Sequential(layer)
    steps = mx.abs(layer.scales)
    with trained_in_place(trainable_sites(WalkedModel(model)), mx.float32) as (trained,):
        trained.shift = mx.ones(layer.scales.shape)
        scales, biases = stored_pair(trained)
        assert mx.array_equal(scales, layer.scales).item()
        assert mx.allclose(mx.abs(biases - layer.biases), steps, rtol=1e-3).item()
        trained.shift, trained.stretch = mx.zeros(layer.scales.shape), mx.ones(layer.scales.shape)
        scales, biases = stored_pair(trained)
        ends = [biases + scales * (2**bits - 1) - (layer.biases + layer.scales * (2**bits - 1)), biases - layer.biases]
        # One step of stretch moves each end of the grid by one step, in opposite directions.
        assert mx.allclose(mx.abs(ends[0]), steps, rtol=1e-2).item()
        assert mx.allclose(ends[0], -ends[1], rtol=1e-2, atol=1e-6).item()


def test_gradients_are_those_of_finite_differences():
    model = nn.Sequential(nn.QuantizedLinear(32, 3, bias=False, group_size=32, bits=4))
    x = mx.random.normal((5, 32), key=mx.random.key(2))
    with trained_in_place(trainable_sites(WalkedModel(model)), mx.float32) as (layer,):

        def loss(stretch, shift):
            layer.stretch, layer.shift = stretch, shift
            return mx.square(model(x)).sum()

        zeros = mx.zeros((3, 1))
        gradients = mx.grad(loss, argnums=(0, 1))(zeros, zeros)
        for which in (0, 1):
            for row in range(3):
                bump = mx.zeros((3, 1)).at[row].add(0.01)
                ends = [
                    loss(*((zeros + s * bump, zeros) if which == 0 else (zeros, zeros + s * bump))) for s in (1, -1)
                ]
                difference = (ends[0] - ends[1]).item() / 0.02
                assert gradients[which][row, 0].item() == pytest.approx(difference, rel=0.02, abs=0.02)
