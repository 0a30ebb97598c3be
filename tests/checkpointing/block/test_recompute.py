"""Arrays that a block takes from elsewhere get their gradients, and mx.checkpoint's silent zeros are shown."""

import enum
import gc
import sys
import threading
import weakref
from argparse import Namespace
from collections import ChainMap, UserDict, deque
from contextvars import ContextVar
from functools import cached_property, partial, partialmethod
from types import ModuleType, SimpleNamespace
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


class Shared:
    weight = None


class Setting(enum.Enum):
    ON = 1


class Sine:
    """Made anew in every call of a block; its method reads a global."""

    def __init__(self, x):
        self.x = x

    def run(self):
        return mx.sin(self.x * GLOBAL).sum()


OTHER = ModuleType("other_module_of_a_user")
exec("import mlx.core as mx\nW = None\ndef sine(x):\n    return mx.sin(x * W).sum()\n", OTHER.__dict__)
PACKAGE = ModuleType("package_of_a_user")
PACKAGE.other = OTHER
VARIABLE = ContextVar("VARIABLE")
LOCAL = threading.local()
ALIVE = []


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


def class_that_is_named(w):
    Shared.weight = w
    return lambda x: mx.sin(x * Shared.weight).sum()


def class_that_is_held(w):
    class Config:
        weight = w

    class Holder:
        def __init__(self):
            self.config = Config

        def __call__(self, x):
            return mx.sin(x * self.config.weight).sum()

    return Holder()


def inherited_class_attribute(w):
    class Base:
        weight = w

    class Holder(Base):
        def run(self, x):
            return mx.sin(x * self.weight).sum()

    return Holder().run


def object_in_a_class(w):
    class Holder:
        helper = SimpleNamespace(weight=w)

        def run(self, x):
            return mx.sin(x * self.helper.weight).sum()

    return Holder().run


def made_in_the_block(w):
    global GLOBAL
    GLOBAL = w
    return lambda x: Sine(x).run()


def descriptor(w):
    class Weight:
        def __get__(self, holder, kind):
            return w

    class Holder:
        weight = Weight()

        def run(self, x):
            return mx.sin(x * self.weight).sum()

    return Holder().run


def property_of_a_class(w):
    class Holder:
        @property
        def weight(self):
            return w

        def run(self, x):
            return mx.sin(x * self.weight).sum()

    return Holder().run


def property_that_is_kept(w):
    class Holder:
        @cached_property
        def weight(self):
            return w * 1

        def run(self, x):
            return mx.sin(x * self.weight).sum()

    return Holder().run


def property_of_a_metaclass(w):
    class Meta(type):
        @property
        def weight(cls):
            return w

    class Holder(metaclass=Meta):
        def run(self, x):
            return mx.sin(x * type(self).weight).sum()

    return Holder().run


def partial_method(w):
    class Holder:
        def _run(self, weight, x):
            return mx.sin(x * weight).sum()

        run = partialmethod(_run, w)

    return Holder().run


def member_of_an_enumeration(w):
    Setting.ON.weight = w
    return lambda x: mx.sin(x * Setting.ON.weight).sum()


def value_of_a_module(w):
    OTHER.W = w
    return lambda x: mx.sin(x * PACKAGE.other.W).sum()


def function_of_a_module(w):
    OTHER.W = w
    return lambda x: OTHER.sine(x)


def module_in_an_attribute(w):
    OTHER.W = w

    class Holder:
        def __init__(self):
            self.kit = OTHER

        def run(self, x):
            return self.kit.sine(x)

    return Holder().run


def value_of_a_module_in_an_item(w):
    OTHER.W = w
    kits = {"other": [PACKAGE]}

    def block(x):
        kit = kits["other"][0].other
        return mx.sin(x * kit.W).sum()

    return block


def module_handed_on(w):
    OTHER.W = w

    def inner(kit, x):
        return kit.sine(x)

    return lambda x: inner(OTHER, x)


def in_a_set(w):
    held = {w}
    return lambda x: mx.sin(x * next(iter(held))).sum()


def in_a_frozen_set(w):
    held = frozenset([w])
    return lambda x: mx.sin(x * next(iter(held))).sum()


def in_a_user_dict(w):
    held = ChainMap({}, UserDict(w=w))
    return lambda x: mx.sin(x * held["w"]).sum()


def in_a_namespace(w):
    held = Namespace(w=w)
    return lambda x: mx.sin(x * held.w).sum()


def behind_a_weak_reference(w):
    module = nn.Module()
    module.weight = w
    ALIVE[:] = [module]
    reference, proxy = weakref.ref(module), weakref.proxy(module)
    return lambda x: mx.sin(x * (reference().weight + proxy.weight) / 2).sum()


def in_a_context(w):
    VARIABLE.set(w)
    return lambda x: mx.sin(x * VARIABLE.get()).sum()


def of_this_thread(w):
    LOCAL.weight = w
    return lambda x: mx.sin(x * LOCAL.weight).sum()


def generator_function(w):
    def weights():
        yield w

    return lambda x: mx.sin(x * next(weights())).sum()


def method_of_a_compiled_module(w):
    module = nn.Module()
    module.weight = w
    inner = mx.compile(lambda x: mx.sin(x * module.weight), inputs=module)
    return lambda x: inner(x).sum()


def state_of_a_compiled_function(w):
    held = [w]
    inner = mx.compile(lambda x: mx.sin(x * held[0]), inputs=held)
    return lambda x: inner(x).sum()


def wrapped_by_a_library(w):
    inner = mx.checkpoint(lambda x, w: mx.sin(x * w))
    return lambda x: inner(x, w).sum()


def given_to_a_library(w):
    scope = {}
    exec("def call(x, *, inner):\n    return inner(x)\n", scope)
    call = scope["call"]
    call.__module__ = "beartype.made_on_the_fly"
    call.__kwdefaults__ = {"inner": lambda x: mx.sin(x * w).sum()}
    return call


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
    class_that_is_named,
    class_that_is_held,
    inherited_class_attribute,
    object_in_a_class,
    made_in_the_block,
    descriptor,
    property_of_a_class,
    property_that_is_kept,
    property_of_a_metaclass,
    partial_method,
    member_of_an_enumeration,
    value_of_a_module,
    function_of_a_module,
    module_in_an_attribute,
    value_of_a_module_in_an_item,
    module_handed_on,
    in_a_set,
    in_a_frozen_set,
    in_a_user_dict,
    in_a_namespace,
    behind_a_weak_reference,
    in_a_context,
    of_this_thread,
    generator_function,
    method_of_a_compiled_module,
    state_of_a_compiled_function,
    wrapped_by_a_library,
    given_to_a_library,
]


@pytest.fixture(autouse=True)
def globals_put_back():
    """Some places are this file's own globals."""
    global GLOBAL
    before = GLOBAL
    yield
    GLOBAL, Shared.weight, OTHER.W = before, None, None
    VARIABLE.set(None)
    vars(LOCAL).clear()
    ALIVE.clear()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_captured_array_has_its_gradient(place, compiled):
    runs = []

    def gradient(checkpoint):
        def loss(w):
            block = place(w)

            def counted(x):
                runs.append(mt.is_recomputing())
                return block(x)

            return checkpoint(counted)(X)

        return mx.compile(mx.grad(loss)) if compiled else mx.grad(loss)

    w = mx.array([1.0, 2.0, 3.0])
    expected = gradient(lambda block: block)(w)
    assert runs == [False]
    found = gradient(mt.checkpoint)(w)
    assert runs == [False, False, True]
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


class Hidden(nn.Module):
    """Multiplies by a weight that it looks up by a name that it computes: out of sight, and documented as such."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def __call__(self, x):
        return mx.tanh(self.inner(x)) * registry()["scale"].weight


@pytest.mark.parametrize(
    ("used_elsewhere", "flag", "text"),
    [
        (False, "ZERO", "ZERO: the block uses this parameter where checkpoint() cannot see it."),
        (True, "WRONG", "WRONG: the block does something else when it is run again"),
    ],
)
def test_what_cannot_be_seen_counts_as_constant_and_is_found_by_verify(used_elsewhere, flag, text):
    model = nn.Module()
    model.block, model.scale = mt.checkpoint(Hidden()), nn.RMSNorm(3)
    hidden_registry["scale"] = model.scale

    def loss(x):
        y = model.block(x)
        return (model.scale(y) if used_elsewhere else y).sum()

    report = mt.verify_checkpoint(model, loss, mx.ones((2, 3)))
    assert not report.ok
    assert [p.path for p in report.wrong] == ["scale.weight"]
    assert report.wrong[0].became_zero is not used_elsewhere
    assert flag in str(report)
    assert text in str(report)


hidden_registry = {}


def registry():
    return sys.modules[__name__].__dict__["hidden" + "_registry"]


def test_the_same_text_with_other_globals_is_other_code():
    def made(scope):
        exec("def block(x):\n    return mx.sin(x * W).sum()\n", scope)
        return scope["block"]

    first = made({"mx": mx, "W": SimpleNamespace})
    with pytest.raises((TypeError, ValueError)):
        mt.checkpoint(first)(X)
    scope = {"mx": mx}
    second = made(scope)

    def loss(w):
        scope["W"] = w
        return mt.checkpoint(second)(X)

    assert mx.any(mx.grad(loss)(mx.array([1.0, 2.0, 3.0])) != 0)


def test_one_array_in_two_arguments_gets_both_gradients():
    block = mt.checkpoint(lambda a, b, *, c: (a * b * mx.sin(c)).sum())
    assert mx.array_equal(mx.grad(lambda x: block(x, x, c=x))(X), mx.grad(lambda x: (x * x * mx.sin(x)).sum())(X))


@pytest.mark.parametrize("kind", [iter, lambda items: (item for item in items), reversed, enumerate])
def test_an_iterator_as_an_argument_is_refused_when_it_is_used_up(kind):
    def block(x, parts):
        for _ in parts:
            x = x * 2
        return x.sum()

    fast = mt.checkpoint(block)
    assert mx.array_equal(fast(X, kind([1, 2])), block(X, kind([1, 2])))
    with pytest.raises(mt.CheckpointError, match=r"block was given an iterator \(.*\) as an argument"):
        mx.grad(lambda x: fast(x, kind([1, 2])))(X)
    assert mx.array_equal(mx.grad(lambda x: fast(x, [1, 2]))(X), mx.full((3,), 4.0))


def test_classes_and_functions_are_forgotten_with_the_model():
    def made():
        weight = mx.array([1.0, 2.0, 3.0])

        class Block(nn.Module):
            helper = SimpleNamespace(weight=weight)

            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(3, 3)

            def __call__(self, x):
                return (self.inner(x) * self.helper.weight * weight).sum()

        block = mt.checkpoint(Block())
        mx.eval(nn.value_and_grad(block, lambda: block(X))())
        return weakref.ref(Block), weakref.ref(block)

    kind, block = made()
    assert block() is None, "a model is gone as soon as nobody holds it"
    gc.collect()
    gc.collect()  # the first one takes the subclass that checkpoint() made
    assert kind() is None
