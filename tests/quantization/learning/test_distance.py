"""Distances on token batches without the logits of either model: as the plain way has them, with less memory."""

import copy
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from distilled_models import Block
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.losses.splitting import split_head
from mlx_tune.quantization.learning.distance import Distance
from mlx_tune.quantization.learning.dwq import _answers, train_dwq
from mlx_tune.quantization.learning.trainable import NAMES, made_dense, trainable_sites, trained_in_place
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.models.stored_outputs import OutputStore


class Speaker(nn.Module):
    """Tied or not, its logits scaled, capped or neither."""

    def __init__(self, vocabulary, tied, capped=False):
        super().__init__()
        self.embed, self.layers, self.capped = nn.Embedding(vocabulary, 64), [Block() for _ in range(2)], capped
        if not tied:
            self.head = nn.Linear(64, vocabulary, bias=True)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x) if "head" in self else self.embed.as_linear(x)
        return mx.tanh(0.5 * logits / 3) * 3 if self.capped else logits


def pair(vocabulary=300, *, tied=True, capped=False, head_bits=3):
    mx.random.seed(0)
    reference = Speaker(vocabulary, tied, capped)
    reference.set_dtype(mx.bfloat16)
    model = copy.deepcopy(reference)
    kept = "head" if not tied and head_bits is None else "none of them"
    nn.quantize(model, 32, 3, class_predicate=lambda path, m: hasattr(m, "to_quantized") and path != kept)
    mx.eval(model.parameters(), reference.parameters())
    return model, reference


def unsplit(model):
    return "nobody asked"


def distance_of(model, reference, store, *, split=split_head):
    return Distance(_answers(model, split), _answers(reference, split), store, made_dense)


def on_a_batch(model, reference, batch, *, linear, look):
    """What `look` makes of the gradient of a distance, linear or plain, on the trained numbers of all layers."""
    walked = WalkedModel(model)
    with (
        OutputStore() as store,
        walked.evaluation_mode(),
        WalkedModel(reference).running(),
        trained_in_place(trainable_sites(walked), mx.float32) as layers,
        walked.float32_arithmetic(),
    ):
        distance = distance_of(model, reference, store, split=split_head if linear else unsplit)
        assert distance.linear == linear
        start = [{name: 0.01 + layer[name] for name in NAMES} for layer in layers]

        def loss(parameters, targets):
            for layer, own in zip(layers, parameters, strict=True):
                for name, value in own.items():
                    dict.__setitem__(layer, name, value)
            return distance.of(batch, targets)

        return look(mx.value_and_grad(loss), start, distance.targets(batch))


@pytest.mark.parametrize("capped", [False, True], ids=["bare", "capped"])
@pytest.mark.parametrize(("tied", "head_bits"), [(True, 3), (False, 3), (False, None)], ids=["tied", "own", "unpacked"])
def test_value_and_gradients_are_those_of_the_plain_way(tied, head_bits, capped):
    batch = read_batches([mx.random.randint(0, 300, (7, 19), key=mx.random.key(1))], "calibration")[0]

    def look(gradient, start, targets):
        value, made = gradient(start, targets)
        return [value, *(array for _, array in tree_flatten(made))], targets[0].shape

    models = pair(tied=tied, capped=capped, head_bits=head_bits)
    (found, states), (expected, logits) = (
        on_a_batch(*models, batch, linear=linear, look=look) for linear in (True, False)
    )
    assert (states, logits) == ((7, 18, 64), (7, 18, 300))
    assert len(found) == len(expected) > 5
    for a, b in zip(found, expected, strict=True):
        a, b = np.array(a), np.array(b)
        assert np.abs(b).max() > 0
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def test_a_step_never_holds_the_logits_of_all_tokens():
    """By the step's graph, with a vocabulary that is all but everything."""
    vocabulary, tokens = 6000, 1024
    batch = read_batches([mx.zeros((8, tokens // 8 + 1), mx.int32)], "calibration")[0]

    def look(gradient, start, targets):
        estimate = mt.estimate_memory(gradient, start, targets, state=models)
        return estimate.floor_bytes - estimate.start_bytes

    models = pair(vocabulary, tied=False, head_bits=None)
    linear, plain = (on_a_batch(*models, batch, linear=linear, look=look) for linear in (True, False))
    logits = 4 * tokens * vocabulary
    assert plain > 3 * logits
    assert linear < 1.5 * logits
    assert linear < 0.4 * plain


def test_states_of_the_reference_are_kept_where_its_logits_would_be():
    model, reference = pair()
    batch = read_batches([mx.zeros((2, 9), mx.int32)], "calibration")[0]
    with OutputStore() as store:
        distance = distance_of(model, reference, store)
        first = distance.targets(batch)
        assert [array.shape for array in first] == [(2, 8, 64)]
        assert len(store) == 1
        assert mx.array_equal(distance.targets(batch)[0], first[0])
        assert distance.of(batch, first).item() > 0


@pytest.mark.parametrize("reference", ["function", "other vocabulary", "no logits"])
def test_what_cannot_be_split_is_taken_whole(reference):
    model, other = pair()
    batch = read_batches([mx.zeros((2, 9), mx.int32)], "calibration")[0]
    if reference == "function":
        other = partial(other)
    elif reference == "other vocabulary":
        other = pair(200)[1]
    else:
        model = other = nn.Sequential(nn.Embedding(300, 4), nn.ReLU())
    with OutputStore() as store:
        distance = distance_of(model, other, store)
        targets = distance.targets(batch)
        assert targets[0].shape[-1] == {"function": 300, "other vocabulary": 200, "no logits": 4}[reference]
        if reference != "other vocabulary":
            assert distance.of(batch, targets).item() >= 0


def test_training_comes_to_the_same_with_and_without_the_logits():
    calibration = read_batches(
        [mx.random.randint(0, 300, (4, 17), key=mx.random.key(i)) for i in range(8)], "calibration"
    )
    found = []
    for plain in (False, True):
        model, reference = pair()
        split = unsplit if plain else split_head
        result = train_dwq(WalkedModel(model), reference, calibration, epochs=2, split=split, progress=False)
        assert result.loss_after < result.loss_before
        found.append((result.loss_before, result.loss_after))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
