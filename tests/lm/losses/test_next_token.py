"""The loss of next tokens: mlx-lm's own value and gradients, whatever is trained and however."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from arithmetic import rounding
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from workload_models import VOCABULARY, language_model

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.lm.losses import next_token
from mlx_tune.lm.losses.next_token import choose_loss

TOKENS = mx.random.randint(0, VOCABULARY, (3, 21), key=mx.random.key(2))
#: A whole row, one whose prompt is left out, and one that is mostly padding.
LENGTHS = mx.array([[0, 20], [7, 20], [1, 4]])


def trained(family: str, what: str) -> nn.Module:
    """A model in float32 whose adapters are not at their beginning."""
    mx.random.seed(0)
    model = language_model(family)
    if "quantized" in what:
        nn.quantize(model, group_size=32, bits=4)
    if what == "full":
        return model
    kind = "dora" if "dora" in what else "lora"
    lm.add_adapters(model, kind, num_layers=-1)
    if "head" in what:
        model.unfreeze(keys=["weight"], strict=False)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    return model


def gradients(model: nn.Module, loss: next_token.Loss, *, compiled: bool = False) -> dict[str, mx.array]:
    grad = nn.value_and_grad(model, loss)

    def step(tokens: mx.array, lengths: mx.array):
        (value, count), found = grad(model, tokens, lengths)
        return {"value": value, "count": count, **dict(tree_flatten(found))}

    state = [model.state, mx.random.state]
    run = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
    return run(TOKENS, LENGTHS)


def same(found: dict[str, mx.array], expected: dict[str, mx.array], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    assert found["count"].item() == expected["count"].item() == 20 + 14 + 4
    for name, right in expected.items():
        assert found[name].dtype == right.dtype, name
        scale = max(1e-30, mx.abs(right).max().item())
        assert mx.abs(found[name] - right).max().item() <= tolerance * scale, name


@pytest.mark.cpu_only
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("what", ["full", "lora", "dora", "quantized lora", "quantized dora", "lora and head"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_value_and_every_gradient_are_mlx_lms(family: str, what: str, checkpointed: bool) -> None:
    model = trained(family, what)
    expected = gradients(model, default_loss)
    with mt.checkpoint_blocks(model) if checkpointed else mt.track_memory():
        same(gradients(model, lm.loss), expected, 2e-5)
        same(gradients(model, choose_loss(model).function), expected, 2e-5)


@pytest.mark.cpu_only
def test_it_is_exact_in_a_compiled_step() -> None:
    model = trained("gemma2", "lora")
    with mt.checkpoint_blocks(model):
        same(gradients(model, lm.loss, compiled=True), gradients(model, default_loss), 2e-5)


@pytest.mark.cpu_only
def test_half_precision_is_nearer_to_float32_than_mlx_lms() -> None:
    model = trained("llama", "full")
    model.set_dtype(mx.bfloat16)
    wide = copy.deepcopy(model)
    wide.set_dtype(mx.float32)
    truth, ours, theirs = (
        gradients(*pair)["value"].item() for pair in ((wide, default_loss), (model, lm.loss), (model, default_loss))
    )
    assert abs(ours - truth) <= abs(theirs - truth)


class Masked(nn.Module):
    """A model that leaves some tokens out of its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.head(self.embedding(tokens)) - 5 * (mx.arange(VOCABULARY) > 500)


def test_a_model_that_cannot_be_split_has_the_plain_loss_and_is_told_once() -> None:
    model = Masked()
    with pytest.warns(UserWarning, match="holds all logits: what it does to the logits of 'head'"):
        first = gradients(model, lm.loss)
    expected = gradients(model, default_loss)
    for found in (first, gradients(model, lm.loss)):
        same(found, expected, 0)
    chosen = choose_loss(model)
    assert chosen.function is default_loss
    assert not chosen.linear
    assert chosen.text.startswith("plain, which holds all logits: what it does to")


def test_the_choice_is_said() -> None:
    model = trained("gemma2", "lora")
    chosen = choose_loss(model)
    assert chosen.linear
    assert chosen.text == "linear: logits of model.embed_tokens a few tokens at a time, capped at 30"
    assert choose_loss(model, plain=True).text == "plain, as asked for: all logits are held"
    assert choose_loss(model, default_loss).text == "the loss that was given"
    with pytest.raises(mt.InvalidArgumentError, match="plain_loss=True and loss="):
        choose_loss(model, default_loss, plain=True)


def test_a_model_is_split_again_when_its_layers_have_changed_and_forgotten_with_it() -> None:
    model = trained("llama", "full")
    before = len(next_token._known)
    gradients(model, lm.loss)
    split = next_token._known[id(model)][2]
    gradients(model, lm.loss)
    assert next_token._known[id(model)][2] is split
    lm.add_adapters(model, "lora", num_layers=-1)
    same(gradients(model, lm.loss), gradients(model, default_loss), rounding(2e-5))
    assert next_token._known[id(model)][2] is not split
    del model, split
    gc.collect()
    assert len(next_token._known) == before


@pytest.mark.cpu_only
def test_a_large_vocabulary_costs_a_step_no_logits(rows, arguments) -> None:
    """The floor of the step from its graph, and the peak of a real one held back as far as it goes."""
    vocabulary, length = 20_000, 257
    model = language_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=vocabulary)
    lm.add_adapters(model, "lora", num_layers=-1)
    mx.eval(model.parameters())
    data = [([(7 * i) % vocabulary for i in range(length)], 0)] * 8
    args, optimizer = arguments(batch_size=8, max_seq_length=length, grad_checkpoint=True), optim.Adam(1e-4)
    logits = 8 * (length - 1) * vocabulary * 4
    floors, peaks = {}, {}
    for plain in (True, False):
        estimate = lm.estimate_memory(model, data, args, optimizer=optimizer, plain_loss=plain)
        floors[plain] = estimate.floor_bytes
        assert estimate.notes[-1].startswith("loss: plain, as asked" if plain else "loss: linear: logits of model.emb")
        with (
            mt.checkpoint_blocks(model),
            lm.training_step(model, optimizer, data, args, plain_loss=plain) as ready,
            mt.memory_limit(1),
        ):
            batch = ready.make_batch(8)
            mx.eval(ready.step(batch), ready.state)  # compiles
            mx.clear_cache()
            with mt.track_memory() as memory:
                mx.eval(ready.step(batch), ready.state)
            peaks[plain] = memory.peak_bytes
    assert floors[True] > 3 * logits
    assert floors[False] < 5 * logits / 8  # four to five chunks of an eighth, instead of three times the whole
    for plain in (True, False):
        assert abs(peaks[plain] / floors[plain] - 1) < 0.1, (plain, peaks[plain], floors[plain])


@pytest.mark.cpu_only
def test_searches_and_training_take_it_by_themselves(toy, rows, arguments) -> None:
    model = toy(lora=True)
    options = {"optimizer": optim.Adam(1e-4), "budget": "1GB"}
    args = arguments(batch_size=2, max_seq_length=32)
    for plain, word in ((False, "loss: linear"), (True, "loss: plain")):
        found = lm.autobatch(model, rows, args, max_batch=2, plain_loss=plain, **options)
        assert found.notes[-1].startswith(word)
        assert word in str(found)
        result = lm.train(toy(lora=True), optim.Adam(1e-4), rows, args=args, plain_loss=plain)
        assert result.loss.startswith(word.removeprefix("loss: "))
        assert word in str(result)


@pytest.mark.cpu_only
@pytest.mark.parametrize("search", [lm.plan_checkpoints, lm.autofit])
def test_searches_for_speed_choose_between_the_losses_and_training_takes_their_choice(
    toy, rows, arguments, search
) -> None:
    model, args = toy(lora=True), arguments(batch_size=2, max_seq_length=32)
    options = {"budget": "1GB"} | ({"max_batch": 2} if search is lm.autofit else {})
    found = search(model, rows, args, **options)
    assert found.loss in ("plain", "linear")
    assert found.notes[-1].startswith(f"loss: {found.loss}")
    for loss in ("plain", "linear"):  # whichever it was
        result = lm.train(model, optim.Adam(1e-4), rows, args=args, fit=replace(found, loss=loss))
        assert result.loss.startswith(loss)
    assert "as the search chose for its speed" in choose_loss(model, fit=replace(found, loss="plain")).text
    assert choose_loss(model, default_loss, fit=replace(found, loss="plain")).text == "the loss that was given"
    asked = search(model, rows, args, plain_loss=True, **options)
    assert asked.loss == ""
    assert asked.notes[-1].startswith("loss: plain, as asked for")


@pytest.mark.cpu_only
def test_training_comes_to_the_same_losses(toy, rows, arguments) -> None:
    results = []
    for plain in (False, True):
        np.random.seed(0)
        model = toy(lora=True)
        model.set_dtype(mx.float32)
        args = arguments(iters=6, steps_per_report=1)
        results.append(lm.train(model, optim.SGD(1e-2), rows, rows[:8], args, plain_loss=plain))
    ours, theirs = results
    for name in ("losses", "validation_losses"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
            assert a.tokens == b.tokens


@pytest.mark.cpu_only
def test_a_loss_of_ones_own_is_taken_as_it_is(toy, rows, arguments) -> None:
    calls = []

    def mine(model, batch, lengths):
        calls.append(batch.shape)
        return default_loss(model, batch, lengths)

    args = arguments(iters=1)
    result = lm.train(toy(lora=True), optim.SGD(1e-2), rows, args=args, loss=mine)
    assert len(calls) == 1
    assert result.loss == "the loss that was given"
    estimate = lm.estimate_memory(toy(lora=True), rows, args, loss=mine)
    assert estimate.notes[-1] == "loss: the loss that was given"
