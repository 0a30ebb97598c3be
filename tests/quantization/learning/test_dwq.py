import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from distilled_models import pair_of_models
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.learning import distance, dwq
from mlx_tune.quantization.learning.dwq import train_dwq
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel


def batches(count=12):
    mx.random.seed(5)
    return read_batches([mx.random.randint(0, 40, (4, 17)) for _ in range(count)], "calibration")


def one_sequence():
    return read_batches([mx.zeros((1, 17), dtype=mx.int32)], "calibration")


def snapshot(model):
    return {name: np.array(a.astype(mx.float32)) for name, a in tree_flatten(model.parameters())}


def test_training_lowers_the_divergence_and_leaves_the_codes(monkeypatch):
    monkeypatch.undo()  # all the steps that there usually are
    model, reference = pair_of_models()
    before = snapshot(model)
    result = train_dwq(WalkedModel(model), reference, batches(40), progress=False)
    assert result.note is None
    assert result.loss_after < 0.9 * result.loss_before
    assert result.layers == 5
    assert result.rate in dwq.RATES
    after = snapshot(model)
    assert before.keys() == after.keys()
    changed = {name.rpartition(".")[2] for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"scales", "biases"}
    assert model.embed.scales.dtype == mx.bfloat16
    assert type(model.layers[0].one) is nn.QuantizedLinear
    assert f"{result.loss_before:.4g} to {result.loss_after:.4g}" in result.summary


def test_batches_of_tokens_are_cut_into_steps_some_of_which_are_kept_aside(monkeypatch):
    monkeypatch.setattr(dwq, "_STEP_TOKENS", 20)
    monkeypatch.setattr(dwq, "_HELD_OUT_TOKENS", 30)
    tokens = mx.arange(64 * 10).reshape(64, 10)
    lessons, judges = dwq._lessons_and_judges(read_batches([tokens[:20], tokens[20:]], "calibration"))
    # 32 steps of two sequences. Four of them could be kept aside, but two hold more than 30 tokens already.
    assert len(lessons) == 30
    assert [judge.tokens[:, 0].tolist() for judge in judges] == [[140, 150], [620, 630]]
    seen = [row for part in lessons + judges for row in part.tokens[:, 0].tolist()]
    assert sorted(seen) == [10 * i for i in range(64)]
    assert seen[:60] != sorted(seen[:60])  # sources that follow each other are mixed


def test_outputs_of_the_reference_that_are_needed_again_are_not_worked_out_again(monkeypatch):
    model, reference = pair_of_models()
    calls = 0

    def counting(tokens):
        nonlocal calls
        calls += 1
        return reference(tokens)

    calibration = batches(4)
    stored = train_dwq(WalkedModel(copy.deepcopy(model)), counting, calibration, epochs=2, progress=False)
    assert calls == 4
    monkeypatch.setattr(distance, "_STORED_BYTES", 0)
    assert train_dwq(WalkedModel(model), counting, calibration, epochs=2, progress=False) == stored
    assert calls > 8


def test_the_reported_loss_is_that_of_the_model_as_it_is_left():
    model, reference = pair_of_models()
    calibration = batches()
    result = train_dwq(WalkedModel(model), reference, calibration, progress=False)
    again = train_dwq(WalkedModel(model), reference, calibration, rates=(1e-9,), progress=False)
    assert again.loss_before == pytest.approx(result.loss_after, rel=1e-3)


def test_a_rate_that_is_too_high_comes_down():
    model, reference = pair_of_models()
    result = train_dwq(WalkedModel(model), reference, batches(40), rates=(1.0,), progress=False)
    assert result.rate < 1
    assert result.loss_after < 0.5 * result.loss_before


def test_a_model_that_would_get_worse_stays_as_it_was():
    model, reference = pair_of_models()
    before = snapshot(model)
    result = train_dwq(WalkedModel(model), reference, batches(4), rates=(50.0,), progress=False)
    assert result.loss_after == result.loss_before
    assert "left as it was" in result.note
    assert "left as it was" in result.summary
    after = snapshot(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_reference_that_gives_no_numbers_changes_nothing():
    model, _ = pair_of_models()
    before = snapshot(model)
    result = train_dwq(WalkedModel(model), lambda x: mx.full((*x.shape, 40), float("nan")), batches(3), progress=False)
    assert result.note is not None
    assert all(np.array_equal(value, before[name]) for name, value in snapshot(model).items())


def test_recomputing_activations_gives_the_same():
    found = []
    for checkpoint in (False, True):
        model, reference = pair_of_models()
        result = train_dwq(
            WalkedModel(model),
            reference,
            batches(6),
            recompute=mt.checkpoint_blocks,
            checkpoint=checkpoint,
            progress=False,
        )
        found.append(result.loss_after)
        assert result.checkpointed is checkpoint
        assert mt.uncheckpoint(model) == 0
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_any_module_and_any_loss_will_do():
    mx.random.seed(1)
    reference = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    target = mx.random.normal((64, 8))
    calibration = read_batches([mx.random.normal((16, 64)) for _ in range(16)], "calibration")
    for reference_or_none, loss in (
        (reference, None),
        (None, lambda m, x: mx.square(m(x) - x @ target).mean()),
    ):
        model = copy.deepcopy(reference)
        nn.quantize(model, 64, 2)
        result = train_dwq(WalkedModel(model), reference_or_none, calibration, loss=loss, progress=False)
        assert result.loss_after < result.loss_before


def test_modes_are_left_alone():
    model, reference = pair_of_models()
    model.train()
    model.layers[1].eval()
    train_dwq(WalkedModel(model), reference, batches(3), progress=False)
    assert [model.training, model.layers[0].training, model.layers[1].training] == [True, True, False]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, r: train_dwq(WalkedModel(m), r, one_sequence()), "calibration holds one sequence"),
        (
            lambda m, r: train_dwq(WalkedModel(nn.Sequential(m)), r, read_batches([mx.ones((2, 3))], "c")),
            "calibration holds one batch",
        ),
        (lambda m, r: train_dwq(WalkedModel(m), None, batches(2)), "unquantized model as reference, or a loss"),
        (lambda m, r: train_dwq(WalkedModel(r), r, batches(2)), "no layer of the model has affine scales"),
    ],
)
def test_what_is_missing_is_said(call, text):
    with pytest.raises(QuantizationError, match=text):
        call(*pair_of_models())


@pytest.mark.parametrize("method", ["gptq", "dwq"])
def test_quantize_model_learns_from_calibration(method):
    _, model = pair_of_models()
    tokens = [b.tokens for b in batches(8)]
    report = mt.quantize_model(model, 3, 32, method=method, calibration=tokens, evaluation=tokens[:1], progress=False)
    assert report.accuracy.mean_kl > 0
    assert {layer.method for layer in report.layers} <= {"gptq", "dwq", "optimal"}
    assert method in {layer.method for layer in report.layers} or any("left as it was" in n for n in report.notes)
