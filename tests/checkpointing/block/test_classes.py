"""Classes for another way of calling: put on, taken off, one in another, copied and pickled."""

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import pytest
from tiled_models import MLP, WIDTH

import mlx_tune as mt
from mlx_tune.checkpointing.block.classes import Wrapping
from mlx_tune.errors import CheckpointError
from mlx_tune.substitution import Substitute


class Doubled(Substitute):
    __slots__ = ()


def new_doubled(plain, *args):
    return doubling.new(plain, *args)


doubling = Wrapping(Doubled, lambda body, module, args, kwargs: 2 * body(*args, **kwargs), "doubled", new_doubled)


def test_a_module_is_called_in_the_other_way_until_it_is_taken_off():
    module, other = nn.Tanh(), nn.Tanh()
    doubling.put_on(module)
    assert module(mx.array(0.5)).item() == 2 * other(mx.array(0.5)).item()
    assert type(module).__name__ == "Tanh"
    vars(module)["note"] = 1
    assert doubling.take_off(module, "note")
    assert not doubling.take_off(module)
    assert type(module) is nn.Tanh
    assert "note" not in vars(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_called_so_too(copied):
    module = nn.Tanh()
    doubling.put_on(module)
    assert copied(module)(mx.array(0.5)).item() == module(mx.array(0.5)).item()


def test_a_class_that_cannot_have_subclasses_is_named():
    class Last(nn.Module):
        def __init_subclass__(cls, **_):
            raise TypeError("no more")

    class Final(type(nn.Module)):
        def __new__(cls, name, bases, members):
            if any(type(base) is cls for base in bases):
                raise TypeError("no more")
            return super().__new__(cls, name, bases, members)

    class Sealed(nn.Module, metaclass=Final):
        def __call__(self, x):
            return x

    with pytest.raises(CheckpointError, match="Sealed cannot be doubled"):
        doubling.put_on(Sealed())


def test_a_tile_and_a_checkpoint_on_one_module_come_off_in_either_order():
    for first, second in ((mt.untile, mt.uncheckpoint), (mt.uncheckpoint, mt.untile)):
        module = mt.checkpoint(mt.tile(MLP(), 4))
        assert mt.is_tiled(module)
        assert mt.is_checkpointed(module)
        assert first(module) == 1
        assert mt.is_tiled(module) is (first is mt.uncheckpoint)
        assert mt.is_checkpointed(module) is (first is mt.untile)
        assert module(mx.ones((1, 9, WIDTH))).shape == (1, 9, WIDTH)
        assert second(module) == 1
        assert type(module) is MLP
