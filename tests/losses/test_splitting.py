"""Models split into their head and what is before it: which can be, and that head and rest give the model's logits."""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

import mlx_tune as mt
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.losses.splitting import SplitHead, split_head
from mlx_tune.upstream import is_lazy

WIDTH, VOCABULARY = 32, 40
TOKENS = mx.array([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


class Model(nn.Module):
    """An embedding, a block and a head, and whatever is to happen to its logits."""

    def __init__(self, head=None, finish=lambda logits: logits, width=WIDTH):
        super().__init__()
        self.embedding, self.block, self.norm = nn.Embedding(VOCABULARY, width), nn.Linear(width, width), nn.RMSNorm(2)
        self.head = head
        self.finish = finish

    def __call__(self, tokens):
        states = mx.tanh(self.block(self.embedding(tokens)))
        return self.finish(self.embedding.as_linear(states) if self.head is None else self.head(states))


def linear(**options):
    return nn.Linear(WIDTH, VOCABULARY, **options)


def quantized(layer):
    return layer.to_quantized(32, 4)


def awake(layer):
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    return layer


def with_embedding(embedding):
    model = Model()
    model.embedding = embedding
    return model


def square():
    return Model(nn.Linear(VOCABULARY, VOCABULARY), width=VOCABULARY)


WHOLE = {
    "tied": Model,
    "linear": lambda: Model(linear()),
    "without bias": lambda: Model(linear(bias=False)),
    "quantized": lambda: Model(quantized(linear())),
    "tied and quantized": lambda: with_embedding(quantized(nn.Embedding(VOCABULARY, WIDTH))),
    "lora": lambda: Model(awake(LoRALinear.from_base(linear(), r=4))),
    "lora on quantized": lambda: Model(awake(LoRALinear.from_base(quantized(linear()), r=4))),
    "dora": lambda: Model(awake(DoRALinear.from_base(linear(), r=4))),
    "lora embedding": lambda: with_embedding(awake(LoRAEmbedding.from_base(nn.Embedding(VOCABULARY, WIDTH), r=4))),
    "as wide as its vocabulary": square,
    "scaled": lambda: Model(linear(), lambda logits: logits * 0.3),
    "divided": lambda: Model(linear(), lambda logits: logits / 7),
    "capped": lambda: Model(linear(), lambda logits: mx.tanh(logits / 0.7) * 0.7),
    "scaled and capped": lambda: Model(linear(), lambda logits: 30 * mx.tanh(logits * 11 / 30)),
    "cast": lambda: Model(linear(), lambda logits: logits.astype(mx.float32)),
    "in another model": lambda: nn.Sequential(Model(linear())),
    "checkpointed head": lambda: Model(mt.checkpoint(linear())),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_head_and_rest_give_the_logits_of_the_model(kind):
    mx.random.seed(0)
    model = WHOLE[kind]()
    kinds = [type(module) for module in model.modules()]
    mx.random.seed(1)
    split = split_head(model)
    assert mx.random.state[0].tolist() == [0, 1]
    assert isinstance(split, SplitHead), split
    logits, expected = split.logits(split.states(model, TOKENS)), model(TOKENS)
    assert mx.allclose(logits, expected, rtol=1e-6, atol=1e-6 * mx.abs(expected).max().item())
    assert [type(module) for module in model.modules()] == kinds
    assert dict(model.named_modules())[split.path] is split.layer


def test_scale_and_cap_are_those_of_the_model():
    for scale in (1e-3, 0.0625, 1 / 7, 1.0, 30.0):
        for cap in (None, 0.5, 15.0, 50.0):
            model = Model(
                linear(),
                lambda x, s=scale, c=cap: x * s if c is None else mx.tanh(x * s / c) * c,
            )
            split = split_head(model)
            assert (split.scale or 1.0) == pytest.approx(scale, rel=1e-6)
            assert split.softcap == (None if cap is None else pytest.approx(cap, rel=1e-6))


class Twice(Model):
    def __call__(self, tokens):
        return self.head(self.block(self.embedding(tokens))) + self.head(self.embedding(tokens))


class Last(Model):
    def __call__(self, tokens):
        return super().__call__(tokens)[:, -1:]


class Product(Model):
    def __call__(self, tokens):
        return self.embedding(tokens) @ self.embedding.weight.T


class Normed(Model):
    def __call__(self, tokens):
        return self.norm(super().__call__(tokens).reshape(*tokens.shape, -1, 2)).reshape(*tokens.shape, -1)


def forbid(logits):
    """Writes in place, as some models forbid tokens that no text has."""
    logits[..., 3] = -mx.inf
    return logits


class Needy(Model):
    def __call__(self, tokens, more):
        return super().__call__(tokens)


REFUSED = {
    "twice": (lambda: Twice(linear()), "calls its output layer 'head' more than once"),
    "last position": (lambda: Last(linear()), "does not return logits of each token"),
    "two outputs": (lambda: Model(linear(), lambda x: (x, x)), "does not return logits of each token"),
    "product with an array": (lambda: Product(linear()), "no linear layer and no embedding"),
    "a layer after it": (lambda: Normed(linear()), "'norm' comes after its output layer 'head'"),
    "more than tokens": (lambda: Needy(linear()), "cannot be called with tokens alone (TypeError"),
    "an offset": (lambda: Model(linear(), lambda x: x + 1), "neither a scale nor a cap"),
    "a mask": (lambda: Model(linear(), lambda x: x * (mx.arange(VOCABULARY) < 30)), "neither a scale nor a cap"),
    "written to": (lambda: Model(linear(), forbid), "neither a scale nor a cap"),
    "another order": (lambda: Model(linear(), lambda x: x[..., ::-1]), "neither a scale nor a cap"),
    "shifted": (lambda: Model(linear(), lambda x: mx.roll(x, 1, axis=1)), "neither a scale nor a cap"),
    "log-probabilities": (lambda: Model(linear(), nn.log_softmax), "neither a scale nor a cap"),
    "negative": (lambda: Model(linear(), lambda x: -x), "neither a scale nor a cap"),
    "clipped": (lambda: Model(linear(), lambda x: mx.clip(x, -5, 5)), "neither a scale nor a cap"),
    "rounded": (lambda: Model(linear(), lambda x: x.astype(mx.float16)), "neither a scale nor a cap"),
    "dropout": (lambda: Model(LoRALinear.from_base(linear(), dropout=0.5)), "'head' draws random numbers"),
    "a head that fails": (lambda: Model(nn.Sequential(nn.ReLU(), nn.Bilinear)), "cannot be called with tokens alone"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_not_split_and_it_is_said_why(kind):
    make, why = REFUSED[kind]
    model = make()
    model.eval()
    reason = split_head(model)
    assert isinstance(reason, str), reason
    assert why in reason
    assert not any(module.training for module in model.modules())


def test_nothing_is_evaluated():
    model = Model(linear(), lambda logits: logits * 0.5)
    assert isinstance(split_head(model), SplitHead)
    assert all(is_lazy(array) for name, array in tree_flatten(model.parameters()) if "bias" not in name)


def test_it_splits_inside_a_compiled_step():
    model = Model(linear(), lambda logits: logits * 0.5)
    found = []

    @partial(mx.compile, inputs=model.state)
    def step(tokens):
        found.append(split_head(model))
        return found[0].states(model, tokens)

    states = step(TOKENS)
    assert found[0].scale == pytest.approx(0.5)
    assert mx.allclose(found[0].logits(states), model(TOKENS), rtol=1e-5, atol=1e-5)


def test_a_model_that_changes_its_ways_is_refused():
    model = Model(linear())
    split = split_head(model)
    model.head = linear()
    with pytest.raises(InvalidArgumentError, match=r"gave 'head' \[\] for tokens \[2, 5\]"):
        split.states(model, TOKENS)
