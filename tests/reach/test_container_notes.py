from typing import NamedTuple

import mlx.core as mx
import pytest

from mlx_tune.reach.container_notes import Note, Ref, Remade, fill, written
from mlx_tune.reach.places import Items


class Pair(NamedTuple):
    first: object
    second: object


def test_a_template_is_filled_at_any_depth_and_keeps_its_classes():
    a, b = mx.array(1), mx.array(2)
    template = Remade(Pair, [Ref(1), Remade(tuple, ["text", Ref(0)], None)], None)
    filled = fill(template, [a, b])
    assert type(filled) is Pair
    assert filled.first is b
    assert filled.second[0] == "text"
    assert filled.second[1] is a
    assert fill("anything else", [a]) == "anything else"


@pytest.mark.parametrize("kind", [tuple, frozenset])
def test_attributes_of_a_subclass_are_kept_past_its_constructor(kind):
    class Named(kind):
        def __new__(cls, name):
            raise AssertionError("made anew, not constructed")

    a = mx.array(1)
    filled = fill(Remade(Named, [Ref(0)], {"name": "x"}), [a])
    assert type(filled) is Named
    assert filled.name == "x"
    assert next(iter(filled)) is a


def test_a_note_forgets_its_arrays_and_takes_others():
    holder = {"weights": mx.array(1), "count": 3}
    note = Note(Items(holder), None, "[{!r}]", None)
    note.marks = {"weights": Ref(0)}
    note.forget()
    assert note.items["weights"] is None
    other = mx.array(2)
    assert note.filled([other]) == {"weights": other, "count": 3}
    assert note.items["weights"] is None


def test_a_place_is_written_as_code_would():
    assert (
        written(((((None, "{}", "model"), ".{}", "layers"), "[{!r}]", 0), "[{!r}]", "key")) == "model.layers[0]['key']"
    )
    assert written(None) == ""
