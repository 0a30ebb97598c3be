"""Each place gives back what it held, whatever was done to it in between."""

from collections import OrderedDict, deque
from contextvars import ContextVar
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from slotted import Single, Slotted

import mlx_tune as mt
from mlx_tune.reach.code_facts import slot_names
from mlx_tune.reach.places import (
    Attributes,
    Cell,
    ContextValue,
    Defaults,
    Items,
    Members,
    PartialArguments,
    SelectedItems,
    Sequence,
)


class Holder:
    weight = [1, 2]


class Awkward(dict):
    """Reading and writing it does something else, as models with magic do."""

    def __getitem__(self, key):
        raise AssertionError("read")

    def __setitem__(self, key, value):
        raise AssertionError("written")


def cell_of(value):
    return (lambda: value).__closure__[0]


def function_with_default(x, y=(1, 2)):
    return x, y


def unbind(cell):
    del cell.cell_contents


def assign(holder, name, value):
    setattr(holder, name, value)


SLOTTED, DEFAULTED, PARTIAL = Slotted(), function_with_default, partial(function_with_default, 1, y=2)

VARIABLE = ContextVar("variable")

VARIABLE.set([1])

SCOPE = {"a": [1], "b": [2], "elsewhere": 3}

CASES = {
    "dictionary, value": (Items({"a": 1, "b": 2}), lambda place: place.held.update(a=3)),
    "dictionary, added": (Items({"a": 1}), lambda place: place.held.update(c=3)),
    "dictionary, removed": (Items({"a": 1, "b": 2}), lambda place: place.held.pop("a")),
    "dictionary, renamed": (Items({"a": 1, "b": 2}), lambda place: (place.held.pop("a"), place.held.update(c=3))),
    "ordered": (Items(OrderedDict(a=1, b=2)), lambda place: place.held.pop("b")),
    "ordered, moved": (Items(OrderedDict(a=1, b=2)), lambda place: place.held.move_to_end("a")),
    "dictionary, same value": (Items({"a": 1, "b": 2}), lambda place: place.held.update(c=place.held.pop("b"))),
    "awkward": (Items(Awkward(a=1)), lambda place: dict.update(place.held, a=2)),
    "list": (Sequence([1, 2]), lambda place: place.held.append(3)),
    "deque": (Sequence(deque([1, 2], maxlen=2)), lambda place: place.held.append(3)),
    "set": (Members({1, 2}), lambda place: place.held.add(3)),
    "context variable": (ContextValue(VARIABLE), lambda place: place.held.set([2])),
    "cell": (Cell(cell_of([1])), lambda place: assign(place.held, "cell_contents", 2)),
    "cell, unbound": (Cell(cell_of([1])), lambda place: unbind(place.held)),
    "defaults": (Defaults(DEFAULTED), lambda place: assign(place.held, "__defaults__", None)),
    "partial": (PartialArguments(PARTIAL), lambda place: place.held.__setstate__((print, (), {}, None))),
    "names, set": (SelectedItems(SCOPE, ("a", "missing")), lambda place: place.held.update(a=5, missing=6)),
    "slots": (Attributes(SLOTTED, slot_names(Slotted)), lambda place: assign(place.held, "seen", None)),
    "slots, removed": (Attributes(SLOTTED, slot_names(Slotted)), lambda place: delattr(place.held, "seen")),
    "slots, empty": (Attributes(Single(), slot_names(Single)), lambda place: assign(place.held, "only", 1)),
    "class": (Attributes(Holder, ("weight",)), lambda place: assign(place.held, "weight", None)),
}


@pytest.mark.parametrize("name", CASES)
def test_given_back(name):
    place, change = CASES[name]
    before = place.get()
    place.put(before)
    assert place.get() == before
    assert place.same(before)
    change(place)
    assert not place.same(before)
    place.put(before)
    assert place.same(before)
    assert place.get() == before
    if isinstance(before, dict):
        assert list(place.get()) == list(before)


def test_a_variable_that_was_not_bound_is_not_bound_again():
    cell = cell_of(1)
    unbind(cell)
    place = Cell(cell)
    before = place.get()
    cell.cell_contents = 3
    place.put(before)
    with pytest.raises(ValueError, match="empty"):
        cell.cell_contents


class Pair(tuple):
    """A tuple of a class of its own, made in its own way and with an attribute."""

    def __new__(cls, first, second):
        made = super().__new__(cls, (first, second))
        made.name = "pair"
        return made


def test_tuples_of_a_class_of_their_own_keep_it():
    seen = []

    def block(parts):
        seen.append((type(parts), parts.name))
        return Pair(parts[0] * parts[1], 3)

    def loss(x):
        pair = mt.checkpoint(block)(Pair(x, mx.array(3.0)))
        assert (type(pair), pair.name, pair[1]) == (Pair, "pair", 3)
        return pair[0]

    assert mx.grad(loss)(mx.array(2.0)).item() == 3.0
    assert seen == [(Pair, "pair"), (Pair, "pair")]


def test_a_list_that_shrinks_in_the_second_run_is_as_before():
    queue = [3, 2, 1]

    def block(x):
        return x * queue.pop()

    gradient = mx.grad(mt.checkpoint(block))(mx.array(2.0))
    assert gradient.item() == 1.0
    assert queue == [3, 2]


def test_objects_that_are_replaced_stay_those_of_the_first_run():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = object()

        def __call__(self, x):
            self.last = object()
            seen.append(self.last)
            return x * 2

    seen = []
    block = mt.checkpoint(Remembering())
    mx.eval(mx.grad(lambda x: block(x).sum())(mx.ones(2)))
    assert len(seen) == 2
    assert block.last is seen[0]


def test_nothing_to_differentiate():
    """Integers in, integers or nothing out; and what was written is written."""
    written = {}

    def block(tokens):
        written["tokens"] = tokens + 1
        return {"tokens": tokens * 2, "none": None}

    out = mt.checkpoint(block)(mx.array([1, 2]))
    assert out["tokens"].tolist() == [2, 4]
    assert written["tokens"].tolist() == [2, 3]
    assert mt.checkpoint(lambda x: None)(mx.array(1.0)) is None
    x = mx.array(2.0)
    assert mx.grad(lambda x: mt.checkpoint(lambda i: i * 2)(mx.array([1])).sum() * x)(x).item() == 2.0


def test_traced_steps_have_the_same_gradients():
    """`estimate_memory` writes the second run out, since MLX cannot export its own checkpoints."""
    from mlx_tune.graphs.tracing.recomputation import tracing

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.norm = nn.BatchNorm(4)
            self.table = nn.Embedding(5, 4)
            self.dropout = nn.Dropout(0.5)

        def __call__(self, x, tokens):
            return self.dropout(mt.keep(self.norm(self.inner(x)), "norm")) * self.table(tokens)

    x, tokens = mx.random.normal((3, 4), key=mx.random.key(0)), mx.array([1, 4, 2])
    block = mt.checkpoint(Block(), keep=["norm"])
    gradient = nn.value_and_grad(block, lambda x: mx.square(block(x, tokens)).sum())
    mx.random.seed(3)
    plain = gradient(x)
    mx.random.seed(3)
    with tracing():
        traced = gradient(x)
    assert plain[0].item() == pytest.approx(traced[0].item(), rel=1e-6)
    assert mx.allclose(plain[1]["inner"]["weight"], traced[1]["inner"]["weight"], rtol=1e-5, atol=1e-6)
