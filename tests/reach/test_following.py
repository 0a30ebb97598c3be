import json
from collections.abc import Callable
from types import FunctionType

from mlx_tune.reach.container_notes import written
from mlx_tune.reach.following import follow_class, follow_function, follow_names
from mlx_tune.reach.places import Attributes, Cell, Defaults, Items, SelectedItems

SHARED = [1]
COUNT = 0


class Settings:
    values = (1, 2)

    def __init__(self) -> None:
        self.made = SHARED

    def read(self) -> object:
        return self.values


class Following:
    """A walk that only writes down what it is told of."""

    def __init__(self, made: bool = False) -> None:
        self.made, self.path, self.home = made, None, None
        self.code, self.holders, self.noted, self.asked = [], [], {}, (0, 0)
        self.looked, self.pushed, self.seen = {}, [], []

    def look(self, value: object) -> object:
        self.looked[written(self.path)] = value
        return value

    def visit(self, value: object) -> bool:
        fresh = not any(value is one for one in self.seen)
        self.seen.append(value)
        return fresh

    def push(self, place: object, form: str) -> None:
        self.pushed.append((type(place), form))


def function() -> Callable[..., object]:
    enclosed = [4]

    def uses(x: object, extra: object = [2], *, more: object = [3]) -> object:
        global COUNT
        COUNT += 1
        return x, SHARED, extra, more, enclosed

    return uses


def followed(value: object, walk: Following) -> Following:
    assert isinstance(value, FunctionType)
    follow_function(walk, value, (None, "{}", "uses"))
    return walk


def test_what_a_function_holds_and_what_its_code_names_is_found() -> None:
    walk = followed(function(), Following())
    assert walk.looked == {"SHARED": SHARED}
    assert walk.pushed == [
        (Cell, ""),
        (Defaults, "'s default {}"),
        (Items, "'s default {}"),
        (SelectedItems, "{}"),  # COUNT, which is assigned
    ]
    assert walk.home == __name__


def test_of_what_code_has_made_only_what_it_holds_counts() -> None:
    walk = followed(function(), Following(made=True))
    assert walk.looked == {}
    assert [kind for kind, _ in walk.pushed] == [Cell, Defaults, Items]


def test_a_library_s_names_are_its_own() -> None:
    walk = followed(json.dumps, Following())
    assert (walk.code, walk.looked) == ([], {})


def test_no_name_of_a_module_is_noted_twice() -> None:
    walk = followed(function(), Following())
    followed(function(), walk)
    assert [kind for kind, _ in walk.pushed].count(SelectedItems) == 1


def test_how_a_class_is_made_counts_only_where_that_may_happen() -> None:
    walk, making = Following(), Following()
    follow_class(walk, Settings)
    follow_class(making, Settings, making=True)
    assert list(walk.looked) == ["Settings.read"]
    assert set(making.looked) == {"Settings.__init__", "Settings.read"}
    assert walk.pushed == making.pushed == [(Attributes, ".{}")]


def test_names_are_asked_for_until_nothing_is_new() -> None:
    walk = followed(function(), Following())
    assert follow_names(walk)
    assert not follow_names(walk)
