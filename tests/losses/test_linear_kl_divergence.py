"""KL divergence from the states of two models: value and gradients against the plain way, and its memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune.errors import InvalidArgumentError, TraceError
from mlx_tune.losses.heads import finished
from mlx_tune.losses.linear_kl_divergence import linear_kl_divergence

VOCABULARY = 96


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def plain(hidden, head, reference_hidden, reference, *, weights=None, reduction="mean", **shape) -> mx.array:
    before = reference(reference_hidden).astype(mx.float32)
    after = head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)
    after = finished(after.astype(mx.float32), shape.get("scale"), shape.get("softcap"))
    lx, ly = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (before, after))
    each = (mx.exp(lx) * (lx - ly)).sum(-1) * (1 if weights is None else weights)
    return {"mean": each.mean, "sum": each.sum, "none": lambda: each}[reduction]()


def gradients(loss, head, hidden, *rest, **options) -> dict[str, mx.array]:
    def scalar(head, hidden):
        value = loss(hidden, head, *rest, **options)
        return (value * mx.arange(1, value.size + 1).reshape(value.shape)).sum()

    value, own = nn.value_and_grad(head, scalar)(head, hidden)
    of_hidden = mx.grad(lambda hidden: scalar(head, hidden))(hidden)
    return {"value": value, "hidden": of_hidden} | dict(tree_flatten(own))


def close(found, expected, tolerance=3e-6):
    assert found.keys() == expected.keys()
    for name in expected:
        a, b = np.array(found[name].astype(mx.float32)), np.array(expected[name].astype(mx.float32))
        assert np.abs(a - b).max() <= tolerance * max(1e-3, np.abs(b).max()), name


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5}], ids=["bare", "shaped"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "quantized"])
def test_value_and_gradients_are_those_of_the_plain_way(kind, reduction, training, options):
    mx.random.seed(0)
    head = nn.Embedding(VOCABULARY, 32) if kind == "embedding" else nn.Linear(32, VOCABULARY)
    head = nn.QuantizedLinear.from_linear(head, 32, 4) if kind == "quantized" else head
    head.train(training)
    given = (head, normal(3, 5, 32), normal(3, 5, 16, seed=1), nn.Linear(16, VOCABULARY))
    options = {"weights": mx.abs(normal(3, 5, seed=2)), "reduction": reduction, **options}
    close(gradients(linear_kl_divergence, *given, chunk_tokens=4, **options), gradients(plain, *given, **options))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.sampled_from([1, 7, 64]), st.integers(1, 41), st.integers(0, 99))
def test_any_shape_against_float64(tokens, vocabulary, chunk, seed):
    hidden, weight = normal(tokens, 8, seed=seed), normal(vocabulary, 8, seed=seed + 1)
    theirs, their_weight = normal(tokens, 4, seed=seed + 2), normal(vocabulary, 4, seed=seed + 3)

    def loss(h):
        return linear_kl_divergence(h, weight, theirs, lambda x: x @ their_weight.T, chunk_tokens=chunk)

    value, gradient = mx.value_and_grad(loss)(hidden)
    ours, w = np.array(hidden, np.float64), np.array(weight, np.float64)
    after, before = ours @ w.T, np.array(theirs, np.float64) @ np.array(their_weight, np.float64).T
    ly, lx = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (after, before))
    assert value.item() == pytest.approx((np.exp(lx) * (lx - ly)).sum(-1).mean(), rel=1e-4, abs=1e-6)
    expected = (np.exp(ly) - np.exp(lx)) @ w / tokens
    assert np.allclose(np.array(gradient), expected, rtol=1e-4, atol=1e-6)


def test_of_a_model_that_agrees_it_is_nothing():
    head, hidden = nn.Linear(16, VOCABULARY), normal(20, 16)
    assert abs(linear_kl_divergence(hidden, head, hidden, head, chunk_tokens=6).item()) < 1e-6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_no_more_than_one_chunk_of_either_models_logits_is_ever_there(trained, compiled):
    """By the step's graph: a few arrays of one chunk, and none of all tokens of one model or the other."""
    tokens, chunk, vocabulary = 512, 32, 4096
    head, theirs = nn.Linear(16, vocabulary, bias=False), nn.Linear(16, vocabulary, bias=False)
    head = head if trained else head.freeze()

    def peak(loss) -> int:
        given = normal(tokens, 16, seed=1)
        if trained:
            grad = nn.value_and_grad(head, lambda head, h: loss(h, head, given, theirs))
            step = lambda h: grad(head, h)  # noqa: E731
        else:
            step = mx.value_and_grad(lambda h: loss(h, head, given, theirs))
        step = mx.compile(step) if compiled else step
        estimate = mt.estimate_memory(step, normal(tokens, 16), state=(head, theirs))
        return estimate.floor_bytes - estimate.start_bytes

    one, all_of_them = 4 * chunk * vocabulary, 4 * tokens * vocabulary
    weights = 4 * 4 * 16 * vocabulary if trained else 0
    assert peak(lambda *a: linear_kl_divergence(*a, chunk_tokens=chunk)) < 8 * one + weights
    assert peak(plain) > 2 * all_of_them


@pytest.mark.parametrize(
    ("states", "reference", "text"),
    [
        (mx.zeros((2, 4)), nn.Linear(4, 9), r"hidden \[3, 4\] and reference_hidden \[2, 4\]"),
        (mx.zeros((3, 4)), nn.Linear(4, 8), r"head makes logits \[3, 9\] and reference \[3, 8\]"),
    ],
)
def test_bad_input_is_named(states, reference, text):
    with pytest.raises(InvalidArgumentError, match=text):
        linear_kl_divergence(mx.zeros((3, 4)), mx.zeros((9, 4)), states, reference)


def test_second_derivatives_are_refused_in_words():
    head, hidden, theirs = normal(9, 4), normal(3, 4), normal(3, 4, seed=1)

    def loss(h):
        return linear_kl_divergence(h, head, theirs, lambda x: x @ head.T)

    with pytest.raises(TraceError, match="first derivatives only"):
        mx.grad(lambda h: mx.grad(loss)(h).square().sum())(hidden)
