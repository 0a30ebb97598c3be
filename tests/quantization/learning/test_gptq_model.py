import mlx.core as mx
import mlx.nn as nn
import pytest
from block_models import make, quantized, tokens

from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.formats.affine import quantize_affine
from mlx_tune.quantization.learning import drift_correction
from mlx_tune.quantization.learning import gptq_model as passes
from mlx_tune.quantization.learning.gptq_model import gptq_model
from mlx_tune.quantization.learning.propagation import Propagation
from mlx_tune.quantization.methods import install
from mlx_tune.quantization.models.sites import WalkedModel


def test_blocks_make_up_for_what_those_before_them_lost(monkeypatch):
    twin, found = make(), []
    for share in (0.0, 0.5):
        monkeypatch.setattr(drift_correction, "_SHARE", share)
        model = make()
        quantized(model, 2, tokens(32))
        found.append(sum(mx.square(model(b.shifted[0]) - twin(b.shifted[0])).sum().item() for b in tokens(2)))
    assert found[1] < 0.97 * found[0]


def test_layers_learn_from_quantized_ones_of_their_own_block(monkeypatch):
    twin, found = make(), []
    for staged in (True, False):
        if not staged:
            monkeypatch.setattr(Propagation, "stages", lambda self, step, modules: [list(modules)])
        model = make()
        quantized(model, 2, tokens(32))
        found.append(sum(mx.square(model(b.shifted[0]) - twin(b.shifted[0])).sum().item() for b in tokens(2)))
    assert found[0] < 0.99 * found[1]


@pytest.mark.parametrize("chained", [True, False])
def test_a_model_is_quantized_block_by_block(chained):
    model, twin = make(chained), make(chained)
    batches = tokens()
    layers = plan_quantization(model, 2, 64).layers
    done = gptq_model(WalkedModel(model), layers, batches, install=install, blocks=blocks_of(model))
    assert [layer.path for layer in done] == [layer.path for layer in layers]
    by_path = {layer.path: layer for layer in done}
    assert by_path["unused"].method == "optimal"
    assert by_path["unused"].note == "kept 'optimal': no calibration input reached it"
    assert sum(layer.method == "gptq" for layer in done) >= 5
    assert all(x.output_error <= x.optimal_output_error for x in done if x.output_error is not None)

    def loss(m):
        return sum(mx.square(m(b.shifted[0]) - twin(b.shifted[0])).sum().item() for b in tokens(2))

    plain = make(chained)
    for layer in plan_quantization(plain, 2, 64).layers:
        weight = layer.module.weight
        install(layer, quantize_affine(weight, 2, 64))
    assert loss(model) < 0.8 * loss(plain)


def test_a_layer_that_does_not_gain_keeps_the_start(monkeypatch):
    monkeypatch.setattr(passes, "_error", lambda *_: 1.0)
    model = make()
    done = quantized(model, 4, tokens(2))
    assert {layer.method for layer in done} == {"optimal"}
    assert any("gptq's output error was 1 against 1" in (layer.note or "") for layer in done)


def test_lookups_alone_have_nothing_to_correct():
    mx.random.seed(0)
    model = nn.Sequential(nn.Embedding(40, 128), nn.Linear(128, 8))
    done = quantized(model, 4, tokens(2))
    assert done[0].method == "optimal"
    assert "lookups only" in done[0].note


def test_no_batches_are_an_error():
    with pytest.raises(QuantizationError, match="calibration is empty"):
        gptq_model(WalkedModel(make()), [], [], install=install)
