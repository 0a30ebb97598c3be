"""Arrays that a block takes from elsewhere get their gradients, and mx.checkpoint's silent zeros are shown."""

from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune as mt

X = mx.array([0.5, -1.0, 2.0])
SHARED = {"weight": mx.array([1.0, 2.0, 3.0])}
GLOBAL = mx.array([1.0, 2.0, 3.0])


class Slotted:
    __slots__ = ("__hidden", "weight")

    def __init__(self, weight):
        self.weight = weight
        self.__hidden = weight

    @property
    def hidden(self):
        return self.__hidden


class Pair(NamedTuple):
    first: mx.array
    second: int


class Ordered(list):
    pass


def closure(w):
    return lambda x: mx.sin(x * w).sum()


def default(w):
    return lambda x, w=w: mx.sin(x * w).sum()


def keyword_default(w):
    def block(x, *, w=w):
        return mx.sin(x * w).sum()

    return block


def in_tuple(w):
    held = (1, ("a", w))
    return lambda x: mx.sin(x * held[1][1]).sum()


def in_named_tuple(w):
    held = Pair(w, 3)
    return lambda x: mx.sin(x * held.first).sum()


def in_list(w):
    held = Ordered([w])
    return lambda x: mx.sin(x * held[0]).sum()


def in_deque(w):
    held = deque([w], maxlen=3)
    return lambda x: mx.sin(x * held[0]).sum()


def in_object(w):
    held = SimpleNamespace(deep=SimpleNamespace(weight=w))
    return lambda x: mx.sin(x * held.deep.weight).sum()


def in_slots(w):
    held = Slotted(w)
    return lambda x: mx.sin(x * (held.weight + held.hidden) / 2).sum()


def in_partial(w):
    return partial(lambda w, x: mx.sin(x * w).sum(), w)


def in_keyword_partial(w):
    return partial(lambda x, *, w: mx.sin(x * w).sum(), w=w)


def through_a_helper(w):
    def helper(x):
        return x * w

    return lambda x: mx.sin(helper(x)).sum()


def bound_method(w):
    class Holder:
        def __init__(self):
            self.weight = w

        def run(self, x):
            return mx.sin(x * self.weight).sum()

    return Holder().run


def class_attribute(w):
    class Holder:
        weight = w

        def run(self, x):
            return mx.sin(x * self.weight).sum()

    return Holder().run


def in_a_module(w):
    module = nn.Module()
    module.weight = w
    return lambda x: mx.sin(x * module.weight).sum()


def state_of_a_compiled_function(w):
    held = [w]
    inner = mx.compile(lambda x: mx.sin(x * held[0]), inputs=held)
    return lambda x: inner(x).sum()


def wrapped_by_a_library(w):
    inner = mx.checkpoint(lambda x, w: mx.sin(x * w))
    return lambda x: inner(x, w).sum()


PLACES = [
    closure,
    default,
    keyword_default,
    in_tuple,
    in_named_tuple,
    in_list,
    in_deque,
    in_object,
    in_slots,
    in_partial,
    in_keyword_partial,
    through_a_helper,
    bound_method,
    class_attribute,
    in_a_module,
    state_of_a_compiled_function,
    wrapped_by_a_library,
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_captured_array_has_its_gradient(place):
    w = mx.array([1.0, 2.0, 3.0])
    expected = mx.grad(lambda w: place(w)(X))(w)
    found = mx.grad(lambda w: mt.checkpoint(place(w))(X))(w)
    assert mx.array_equal(found, expected)
    assert mx.any(expected != 0)


def test_mx_checkpoint_gives_captured_arrays_zero():
    w = mx.array([1.0, 2.0, 3.0])
    assert not mx.any(mx.grad(lambda w: mx.checkpoint(closure(w))(X))(w))


def test_globals_that_the_code_names():
    def block(x):
        return mx.sin(x * SHARED["weight"] * GLOBAL).sum()

    def loss(w, g, function):
        global GLOBAL
        kept, GLOBAL = GLOBAL, g
        SHARED["weight"], shared = w, SHARED["weight"]
        try:
            return function(X)
        finally:
            GLOBAL = kept
            SHARED["weight"] = shared

    w, g = mx.array([1.0, 2.0, 3.0]), mx.array([0.3, 0.2, 0.1])
    plain = mx.grad(loss, (0, 1))(w, g, block)
    checked = mx.grad(loss, (0, 1))(w, g, mt.checkpoint(block))
    assert all(mx.array_equal(a, b) for a, b in zip(plain, checked, strict=True))
    assert GLOBAL.tolist() == SHARED["weight"].tolist() == [1.0, 2.0, 3.0]


def test_module_that_reads_another_object():
    """A value parked on another object by an earlier block, as models with skip connections do."""

    class Parked(nn.Module):
        def __init__(self, shelf):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.shelf = shelf

        def __call__(self, x):
            y = mx.tanh(self.inner(x))
            if self.shelf.value is not None:
                y = y + self.shelf.value
            self.shelf.value = y * 2
            return y

    def run(wrap):
        mx.random.seed(0)
        shelf = SimpleNamespace(value=None)
        model = nn.Sequential(Parked(shelf), Parked(shelf), Parked(shelf))
        if wrap:
            for layer in model.layers:
                mt.checkpoint(layer)

        def loss(x):
            shelf.value = None
            return model(x).sum() + shelf.value.sum()

        return nn.value_and_grad(model, loss)(mx.ones((2, 3)))

    (plain_loss, plain), (loss, checked) = run(False), run(True)
    assert plain_loss.item() == loss.item()
    for a, b in zip(plain["layers"], checked["layers"], strict=True):
        for name in ("weight", "bias"):
            assert mx.allclose(a["inner"][name], b["inner"][name], rtol=1e-6, atol=0)


def test_constants_stay_constants():
    constant, number = mx.array([1.0, 2.0, 3.0]), 3
    block = mt.checkpoint(lambda x: mx.sin(x * constant * number).sum())
    assert mx.array_equal(mx.grad(block)(X), mx.grad(lambda x: mx.sin(x * constant * 3).sum())(X))
    assert constant.tolist() == [1.0, 2.0, 3.0]


def test_containers_are_as_before_after_a_step():
    held = {"list": [mx.array(1.0), (mx.array(2.0), "a")], "none": None}
    parts = [held["list"][0], held["list"][1], held["list"][1][0]]

    def block(x):
        return (x * held["list"][0] * held["list"][1][0]).sum()

    mx.eval(mx.grad(mt.checkpoint(block))(X))
    assert held["list"][0] is parts[0]
    assert held["list"][1] is parts[1]
    assert held["list"][1][0] is parts[2]
    assert list(held) == ["list", "none"]


def test_what_cannot_be_seen_counts_as_constant_and_is_found_by_verify():
    """Looked up by a name that the code computes: out of sight, and documented as such."""

    class Hidden(nn.Module):
        def __init__(self, path):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.scale_path = path

        def __call__(self, x):
            return mx.tanh(self.inner(x)) * registry()[self.scale_path].weight

    scale = nn.RMSNorm(3)
    hidden_registry["scale"] = scale
    model = nn.Sequential(Hidden("scale"), scale)
    mt.checkpoint(model.layers[0])
    report = mt.verify_checkpoint(model, lambda x: model(x).sum(), mx.ones((2, 3)))
    assert not report.ok
    assert [p.path for p in report.wrong] == ["layers.1.weight"]


hidden_registry = {}


def registry():
    return __import__("sys").modules[__name__].__dict__["hidden" + "_registry"]
