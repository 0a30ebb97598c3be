"""Pieces: values and every gradient against the plain module, random draws, and what is alive at a time."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from arithmetic import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from tiled_models import KINDS, MLP, WIDTH, Adding, furthest, gradients, made

import mlx_tune as mt
from mlx_tune.errors import CheckpointError
from mlx_tune.upstream import drawing, operations_in


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_plain_module(kind, compiled):
    module, x = made(kind), normal(2, 11, WIDTH)
    expected = gradients(module, x)
    mt.tile(module, tokens=6)
    assert furthest(gradients(module, x, compiled), expected) < rounding(1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 9), st.integers(1, 40))
def test_any_shape_and_any_size_of_a_piece(leading, length, tokens):
    module, x = made("mlp"), normal(*leading, length, WIDTH)
    expected = gradients(module, x)
    assert furthest(gradients(mt.tile(module, tokens), x), expected) < rounding(1e-5)


def test_other_arrays_with_the_same_positions_are_cut_too():
    mx.random.seed(0)
    module, x = Adding(), normal(2, 9, WIDTH)
    named = {"residual": normal(2, 9, WIDTH, seed=1), "scale": normal(WIDTH, seed=2), "power": 2}
    expected = gradients(module, x, **named)
    mt.tile(module, 4)
    assert furthest(gradients(module, x, **named), expected) < 1e-5

    def of(scale, residual):
        return module(x, residual=residual, scale=scale, power=2).sum()

    found = mx.grad(of, argnums=(0, 1))(named["scale"], named["residual"])
    mt.untile(module)
    expected = mx.grad(of, argnums=(0, 1))(named["scale"], named["residual"])
    assert all(mx.allclose(a, b, rtol=1e-5, atol=1e-5).item() for a, b in zip(found, expected, strict=True))


def test_an_array_from_outside_gets_its_gradient():
    class Scaled(nn.Module):
        def __call__(self, x):
            return mx.tanh(x * factor["by"])

    factor = {"by": mx.array(2.0)}
    module, x = Scaled(), normal(1, 9, 4)

    def loss(by):
        factor["by"] = by
        return module(x).sum()

    expected = mx.grad(loss)(mx.array(2.0)).item()
    factor["by"] = mx.array(2.0)
    mt.tile(module, 4)
    assert mx.grad(loss)(mx.array(2.0)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_sums_over_pieces_lose_no_more_than_one_product(dtype):
    module, x = made("mlp"), normal(1, 512, WIDTH)
    truth = gradients(module, x)
    module.set_dtype(dtype)
    plain = gradients(module, x.astype(dtype))
    found = gradients(mt.tile(module, 32), x.astype(dtype))
    assert all(found[name].dtype == plain[name].dtype for name in plain)
    wide = [{name: a.astype(mx.float32) for name, a in each.items()} for each in (found, plain)]
    assert furthest(wide[0], truth) < 1.3 * furthest(wide[1], truth)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_draws_are_repeated_for_the_gradient(compiled):
    """Where dropout is all that a module does, its gradient is its mask."""
    module = mt.tile(nn.Dropout(0.5), 4)
    x = mx.ones((1, 64, 8))
    function = mx.value_and_grad(lambda x: module(x).sum())
    function = (
        mx.compile(function, inputs=[module.state, mx.random.state], outputs=mx.random.state) if compiled else function
    )
    masks = []
    for _ in range(2):
        value, mask = function(x)
        assert value.item() == mask.sum().item()
        assert 0.3 < (mask == 0).mean().item() < 0.7
        masks.append(mask)
    assert not mx.array_equal(*masks)
    assert not mx.array_equal(masks[0][:, :4], masks[0][:, 4:8])  # pieces draw for themselves


def test_a_module_that_draws_nothing_leaves_the_stream_alone():
    module = mt.tile(made("mlp"), 4)
    before = mx.random.state[0]
    module(normal(1, 9, WIDTH))
    assert mx.random.state[0] is before


def test_evaluation_mode_works_in_pieces_too():
    module, x = made("mlp").eval(), normal(1, 9, WIDTH)
    expected = module(x)
    assert mx.allclose(mt.tile(module, 2)(x), expected, atol=rounding(1e-5)).item()


def test_second_derivatives():
    module, x = made("mlp"), normal(1, 9, WIDTH)

    def slope(x):
        return (mx.grad(lambda x: mx.sin(module(x)).sum())(x) ** 2).sum()

    expected = mx.grad(slope)(x)
    mt.tile(module, 4)
    assert mx.allclose(mx.grad(slope)(x), expected, rtol=rounding(1e-4), atol=rounding(1e-5)).item()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("checkpoint", ["outside", "itself"])
def test_inside_a_checkpoint(checkpoint, compiled):
    mx.random.seed(0)
    module, x = nn.Sequential(MLP(), nn.Tanh(), MLP()), normal(2, 9, WIDTH)
    expected = gradients(module, x)
    for part in (module.layers[0], module.layers[2]):
        mt.tile(part, 4)
        if checkpoint == "itself":
            mt.checkpoint(part)
    if checkpoint == "outside":
        mt.checkpoint(module)
    assert furthest(gradients(module, x, compiled), expected) < rounding(1e-5)


def test_a_checkpoint_around_it_multiplies_no_more_often():
    """The block's second run leaves the pieces out, since their gradient runs them again anyway."""
    mx.random.seed(0)
    module, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), MLP()), normal(1, 64, WIDTH)
    step = nn.value_and_grad(module, lambda x: module(x).sum())

    def products(tokens=None):
        if tokens:
            mt.tile(module.layers[1], tokens)
        value, found = step(x)
        drawn = drawing(value, *(array for _, array in tree_flatten(found)))
        return sum(name in ("Matmul", "AddMM") for name, _, _ in operations_in(drawn))

    mt.checkpoint(module)
    alone = products()
    assert products(64) == alone
    assert products(16) - products(32) == 2 * (products(32) - alone)  # each piece has as many as there were


@pytest.mark.cpu_only
@pytest.mark.parametrize("training", [True, False])
def test_no_more_than_one_piece_is_alive(training):
    """Forward and backward: eight times the length takes no more than what goes in and out."""
    mx.random.seed(0)
    wide = 32 * WIDTH
    module = MLP(wide)
    module.train(training)
    mt.tile(module, 64)
    mx.eval(module.parameters())

    def held(length, gradient):
        x = normal(1, length, WIDTH)
        mx.eval(x)
        step = nn.value_and_grad(module, lambda x: module(x).sum()) if gradient else module
        peaks = []
        with mt.memory_limit(1):
            mx.eval(step(x))
            for _ in range(4):  # dispatch runs ahead of the worker now and then
                mx.clear_cache()
                before = mx.get_active_memory()
                mx.reset_peak_memory()
                mx.eval(step(x))
                peaks.append(mx.get_peak_memory() - before)
        return min(peaks)

    for gradient in (True, False):
        more = held(2048, gradient) - held(256, gradient)
        passing = 4 * WIDTH * (2048 - 256)  # the bytes of an array such as goes in and out
        assert more < 6 * passing < 4 * wide * (2048 - 256)


def test_the_estimate_knows_pieces():
    mx.random.seed(0)
    module, x = MLP(32 * WIDTH), normal(1, 1024, WIDTH)
    mx.eval(module.parameters(), x)
    step = nn.value_and_grad(module, lambda x: module(x).sum())

    def floor():
        found = mt.estimate_memory(lambda x: step(x), x, state=module)
        return found.floor_bytes - found.start_bytes

    plain = floor()
    mt.tile(module, 64)
    assert floor() < 0.35 * plain


def test_what_does_not_return_positions_is_refused():
    class Summing(nn.Module):
        def __call__(self, x, other):
            return x.sum(-2)

    with pytest.raises(CheckpointError, match="cannot be tiled"), pytest.warns(UserWarning, match="could not be tried"):
        mt.tile(Summing(), 4)(mx.ones((1, 9, 4)), 1)


def test_what_is_given_no_positions_is_called_as_it_is():
    module = mt.tile(made("activation"), 4)
    assert module(mx.ones((3,))).shape == (3,)
