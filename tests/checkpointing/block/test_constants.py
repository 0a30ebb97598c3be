"""Operations that have no gradient for some of their inputs: no matter, where that is a constant."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune as mt
from mlx_tune.checkpointing.block.constants import constants

X = mx.array([0.5, -1.0, 2.0])
RUNS = []


class Turn(nn.Module):
    """Multiplies by what a decomposition of one weight gives, and by another weight."""

    def __init__(self):
        super().__init__()
        self.basis = mx.random.normal((3, 3), key=mx.random.key(0))
        self.scale = mx.array([1.0, 2.0, 3.0])
        self.inner = nn.Linear(3, 3)

    def __call__(self, x):
        RUNS.append(1)
        return mx.tanh(self.inner(x)) * self.scale @ mx.linalg.qr(self.basis, stream=mx.cpu)[0]


@pytest.fixture(autouse=True)
def no_runs():
    RUNS.clear()


def frozen():
    mx.random.seed(0)
    model = Turn()
    model.freeze(recurse=False)
    return model


def loss(model, x):
    return mx.square(model(x)).sum()


def test_what_is_certain_and_what_may_be_constant():
    fixed = mx.ones((2,))
    seen = []

    def look(x, held):
        arrays = [x, held, fixed, fixed * 2, held * 2, mx.stop_gradient(x * 3), x.reshape(2, 1), fixed + x]
        seen.append(constants(arrays, range(len(arrays))))
        return (x * held).sum()

    mx.grad(look)(fixed, fixed + 1)
    mx.compile(mx.grad(look))(fixed, fixed + 1)
    assert seen == [({2, 3, 5}, {0, 1})] * 2, "what is an argument is a tracer, whether differentiated by or not"


def test_a_frozen_weight_is_found_out_once():
    model = frozen()
    expected = nn.value_and_grad(model, loss)(model, X)[1]["inner"]["weight"]
    mt.checkpoint(model)
    for given, runs in (((model, X), 7), ((model, X), 2), ((model, X), 2)):
        RUNS.clear()
        found = nn.value_and_grad(model, loss)(*given)[1]["inner"]["weight"]
        assert mx.array_equal(found, expected)
        assert len(RUNS) == runs
    assert copy.deepcopy(model)(X).shape == (3,)


def test_a_frozen_weight_that_has_a_gradient_gets_it_all_the_same():
    """By `mx.grad` over all parameters, frozen or not: only what an operation refuses is left out, and shows it."""
    model = mt.checkpoint(frozen())

    def of_parameters(parameters):
        model.update(parameters)
        return loss(model, X)

    def plain(scale):
        model.scale = scale
        return loss(model, X)

    parameters = model.parameters()
    found = mx.grad(of_parameters)(parameters)
    assert mx.array_equal(found["scale"], mx.grad(plain)(parameters["scale"]))
    assert mx.any(found["scale"] != 0)
    assert mx.all(mx.isnan(found["basis"])), "the plain model raises here, and zero would look like a gradient"


def test_a_trained_weight_raises_as_in_the_plain_model():
    model = Turn()
    with pytest.raises(ValueError, match="QR"):
        nn.value_and_grad(model, loss)(model, X)
    mt.checkpoint(model)
    with pytest.raises(ValueError, match="QR"):
        nn.value_and_grad(model, loss)(model, X)
    model.freeze(keys=["basis"], recurse=False)
    mx.eval(nn.value_and_grad(model, loss)(model, X))
    model.unfreeze()
    with pytest.raises(ValueError, match="QR"):
        nn.value_and_grad(model, loss)(model, X)


def test_a_trained_weight_does_not_matter_to_the_gradient_of_the_input():
    model = Turn()
    expected = mx.grad(lambda x: loss(model, x))(X)
    mt.checkpoint(model)
    assert mx.array_equal(mx.grad(lambda x: loss(model, x))(X), expected)


def test_an_argument_says_what_to_do():
    def block(x, basis):
        return (x @ mx.linalg.qr(basis, stream=mx.cpu)[0]).sum()

    fast, basis = mt.checkpoint(block), mx.random.normal((3, 3), key=mx.random.key(0))
    expected = mx.grad(block)(X, basis)
    with pytest.raises(ValueError, match="QR") as caught:
        mx.grad(fast)(X, basis)
    assert "through mx.stop_gradient" in caught.value.__notes__[0]
    assert mx.array_equal(mx.grad(lambda x, basis: fast(x, mx.stop_gradient(basis)))(X, basis), expected)
    # One that is made on the way, or that is no argument of what is differentiated, is known to be constant.
    assert mx.array_equal(mx.grad(lambda x: fast(x, basis))(X), expected)
    assert mx.array_equal(mx.grad(lambda x: fast(x, basis * 1))(X), expected)


def test_blocks_inside_blocks():
    model = nn.Sequential(frozen(), frozen())
    expected = nn.value_and_grad(model, loss)(model, X)[1]["layers"][0]["inner"]["weight"]
    for layer in model.layers:
        mt.checkpoint(layer)
    mt.checkpoint(model)
    for _ in range(2):
        found = nn.value_and_grad(model, loss)(model, X)[1]["layers"][0]["inner"]["weight"]
        assert mx.array_equal(found, expected)


def test_second_order():
    model = frozen()

    def penalty(model, x):
        return mx.square(mx.grad(lambda x: loss(model, x))(x)).sum()

    expected = nn.value_and_grad(model, penalty)(model, X)[1]["inner"]["weight"]
    mt.checkpoint(model)
    found = nn.value_and_grad(model, penalty)(model, X)[1]["inner"]["weight"]
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_error_of_the_block_itself_is_not_tried_again():
    runs = []

    def block(x):
        runs.append(1)
        if mt.is_recomputing():
            raise ValueError("on purpose")
        return x.sum()

    with pytest.raises(ValueError, match="on purpose"):
        mx.grad(mt.checkpoint(block))(X)
    assert len(runs) == 2
