"""Modules get other classes and have their own again; other instances do not notice."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_tune.substitution import Substitute, is_substitute, plain_class, subclass, substitute, substituted


def doubled(plain: Any) -> type:
    return subclass(plain, {"__call__": lambda self, *args: 2 * plain.__call__(self, *args)})


class Slotted:
    __slots__ = ("value",)

    def __call__(self) -> int:
        return 1


class Listed(nn.Module):
    """Notes its subclasses, and asks something of them."""

    kinds: list[str] = []

    def __init_subclass__(cls, *, name: str) -> None:
        Listed.kinds.append(name)

    def __call__(self) -> int:
        return 1


class Stubborn(nn.Module):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise AttributeError(f"{name} is not to be set")
        super().__setattr__(name, value)

    def __call__(self) -> int:
        return 1


class Meta(type):
    pass


class OfAMeta(nn.Module, metaclass=Meta):
    def __call__(self) -> int:
        return 1


@pytest.mark.parametrize("kind", [Slotted, Listed, Stubborn, OfAMeta])
def test_any_module_gets_another_class_and_has_its_own_again(kind: Any) -> None:
    one, other = kind(), kind()
    with substituted([(one, doubled(kind))]):
        assert (one(), other()) == (2, 1)
        assert isinstance(one, kind)
        assert (type(one).__name__, type(one).__module__, type(type(one))) == (kind.__name__, __name__, type(kind))
        assert plain_class(type(one)) is kind
    assert type(one) is kind
    assert one() == 1
    assert Listed.kinds == []


def test_one_inside_another_comes_undone_in_turn() -> None:
    layer = nn.Linear(2, 2)
    x = mx.ones((1, 2))
    plain = layer(x)
    with substituted([(layer, doubled(type(layer)))]):
        with substituted([(layer, doubled(type(layer)))]):
            assert mx.array_equal(layer(x), 4 * plain)
        assert mx.array_equal(layer(x), 2 * plain)
    assert type(layer) is nn.Linear


def test_of_an_object_that_comes_twice_the_first_class_counts() -> None:
    one = Slotted()
    with substituted((one, doubled(type(one))) for _ in range(2)):
        assert one() == 2
    assert type(one) is Slotted


def test_a_pair_that_cannot_be_made_undoes_those_before_it() -> None:
    one = Slotted()

    def pairs() -> Any:
        yield one, doubled(Slotted)
        yield one.value, Slotted  # AttributeError: it was never set

    with pytest.raises(AttributeError), substituted(pairs()):
        pass
    assert type(one) is Slotted


def test_kinds_of_substitutes_are_told_apart() -> None:
    class Marked(Substitute):
        __slots__ = ()

    kind = subclass(doubled(Slotted), {}, Marked)
    assert issubclass(kind, Marked)
    assert not issubclass(doubled(Slotted), Marked)
    assert is_substitute(kind)
    assert not is_substitute(Slotted)
    assert not is_substitute(type("Below", (kind,), {}))
    one = Slotted()
    substitute(one, kind)
    assert one() == 2


def test_a_class_that_cannot_be_subclassed_says_so() -> None:
    with pytest.raises(TypeError, match="not an acceptable base type"):
        subclass(bool, {})
