"""Models that cannot be called, or that read a layer's weight themselves: found before anything is computed."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.models.batches import Batch, read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.shape_check import check_runs, outline, resolve


class Tied(nn.Module):
    """Its head multiplies by the embedding's weight, as in mlx-lm's Seed-OSS and Llama 4 where they are tied."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 128)
        self.layers = [nn.Linear(128, 128) for _ in range(layers)]

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = nn.relu(layer(x))
        return x @ self.embed.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {"evaluation": [toys.tokens()]},
        {"calibration": [toys.tokens(seed=i) for i in range(2)], "method": "gptq"},
        {"calibration": [toys.tokens(seed=i) for i in range(2)], "target_bpw": 6},
        {"evaluation": [toys.tokens()], "loss": lambda model, x: model(x[:, :-1])},
    ],
    ids=["evaluation", "gptq", "target", "loss"],
)
def test_a_weight_that_the_model_reads_itself_is_named_before_anything_is_done(monkeypatch, options: dict) -> None:
    model = Tied()
    before, kinds = toys.arrays_of(model), [type(m) for m in model.modules()]
    monkeypatch.setattr("mlx_tune.quantization.methods.pack_weight", None)
    with pytest.raises(mt.MlxTuneError, match=r"once embed is packed: ValueError: .*skip=\['embed'\]"):
        mt.quantize_model(model, 4, 64, progress=False, **options)
    assert [type(m) for m in model.modules()] == kinds
    assert toys.same_arrays(before, toys.arrays_of(model))


def test_the_plan_names_it_too() -> None:
    with pytest.raises(mt.MlxTuneError, match=r"once embed is packed"):
        mt.plan_quantization(Tied(), 4, 64, evaluation=[toys.tokens()])
    with pytest.raises(mt.MlxTuneError, match=r"cannot be called with calibration\[0\]"):
        mt.plan_quantization(Tied(), 4, 64, calibration=[mx.ones((3, 3))])


def test_it_works_with_that_layer_left_alone() -> None:
    report = mt.quantize_model(Tied(), 4, 64, skip=["embed"], evaluation=[toys.tokens()], progress=False)
    assert len(report.layers) == 3
    assert report.accuracy.mean_kl < 0.1


def test_several_culprits_are_all_found() -> None:
    class Several(Tied):
        def __call__(self, tokens: mx.array) -> mx.array:
            return self.embed(tokens) @ self.layers[1].weight @ self.layers[4].weight @ self.layers[0].weight

    model = Several(6)
    layers = plan_quantization(model).layers
    with pytest.raises(mt.MlxTuneError, match=r"once layers\.0, layers\.1, layers\.4 are packed"):
        check_runs(WalkedModel(model), layers, Batch((toys.tokens(),), toys.tokens()))


def test_nothing_is_evaluated(tmp_path) -> None:
    model = toys.llama()
    mx.save_safetensors(str(tmp_path / "w.safetensors"), toys.arrays_of(model))
    model.load_weights(str(tmp_path / "w.safetensors"))
    before = mx.get_active_memory()
    check_runs(WalkedModel(model), plan_quantization(model).layers, Batch((toys.tokens(),), toys.tokens()))
    assert mx.get_active_memory() < before + 10_000
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("make", [toys.llama, toys.qwen3_moe, toys.gemma2, toys.lfm2])
def test_models_that_call_their_layers_pass_in_every_mode(make, mode: str) -> None:
    model = make()
    check_runs(WalkedModel(model), plan_quantization(model, mode=mode).layers, Batch((toys.tokens(),), toys.tokens()))


class Predictor(nn.Module):
    """Logits for token ids."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)

    def __call__(self, tokens):
        return self.embed.as_linear(self.embed(tokens))


class WholeRows(Predictor):
    """Takes rows of one length alone."""

    def __call__(self, tokens):
        return super().__call__(tokens.reshape(-1, 6))


def batches(*of):
    return read_batches(list(of), "evaluation")


def test_shapes_are_known_without_evaluating():
    model = Predictor()
    assert outline(WalkedModel(model), batches(mx.zeros((4, 6), mx.int32))[0]) == [(1, 5, 16)]
    assert outline(WalkedModel(nn.Linear(3, 2)), batches(mx.zeros((4, 3)))[0]) == [(4, 2)]


def test_a_fault_is_handed_back():
    assert isinstance(outline(WalkedModel(nn.Linear(3, 2)), batches(mx.zeros((4, 5)))[0]), ValueError)


def test_integers_that_cannot_be_shortened_are_no_tokens():
    tokens = mx.zeros((4, 6), mx.int32)
    assert resolve(WalkedModel(Predictor()), batches(tokens), "evaluation")[0].tokens is not None
    assert resolve(WalkedModel(WholeRows()), batches(tokens), "evaluation")[0].tokens is None


def test_what_cannot_be_called_is_named_with_its_shapes():
    with pytest.raises(QuantizationError, match=r"model cannot be called with calibration\[0\] \(\[4, 5\]\)"):
        resolve(WalkedModel(nn.Linear(3, 2)), batches(mx.zeros((4, 5))), "calibration")
    with pytest.raises(QuantizationError, match="loss cannot be called"):
        resolve(
            WalkedModel(nn.Linear(3, 2)), batches(mx.zeros((4, 3))), "calibration", lambda model, x: model(x, x).sum()
        )


def test_no_batches_need_no_call():
    assert resolve(WalkedModel(nn.Linear(3, 2)), [], "evaluation") == []
