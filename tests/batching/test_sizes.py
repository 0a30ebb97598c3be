"""The sizes that searches may answer, against trying every one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.batching.sizes import agreed_sizes
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.measuring.ranks import Ranks

_SMALL = st.integers(1, 400)


@settings(deadline=None)
@given(_SMALL, st.none() | _SMALL, st.integers(1, 12), st.none() | _SMALL)
def test_sizes_are_those_that_trying_each_would_give(least, most, multiple, target):
    top = most if most is not None else target if target is not None else 500
    fine = [n for n in range(least, top + 1) if n % multiple == 0 and (target is None or target % n == 0)]
    if not fine and (most is not None or target is not None):
        with pytest.raises(InvalidArgumentError, match=r"no size lies between|There is no multiple"):
            agreed_sizes(Ranks(), least, most, multiple, target)
        return
    assert list(agreed_sizes(Ranks(), least, most, multiple, target)[: len(fine)]) == fine


@pytest.mark.parametrize("target", [30_000_000, 2**32, 2**32 - 5])
def test_huge_targets_have_few_divisors_and_are_not_looked_for_one_by_one(target):
    sizes = agreed_sizes(Ranks(), 1, None, 1, target)
    assert (sizes[0], sizes[-1]) == (1, target)
    assert len(sizes) < 200
    assert all(target % n == 0 for n in sizes)


def test_a_target_beyond_all_sizes_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"target_batch=1000000000000: .* 4,294,967,296 rows"):
        agreed_sizes(Ranks(), 1, None, 1, 10**12)


def test_numpys_whole_numbers_are_whole_numbers_and_come_out_as_pythons():
    sizes = agreed_sizes(Ranks(), np.int64(2), np.uint8(40), np.int32(2), np.int16(36))
    assert sizes == (2, 4, 6, 12, 18, 36)
    assert {type(n) for n in sizes} == {int}


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", np.float64(3)])
@pytest.mark.parametrize("name", ["min_batch", "max_batch", "multiple_of", "target_batch"])
def test_anything_else_is_named(name, value):
    given = {"min_batch": 1, "max_batch": None, "multiple_of": 1, "target_batch": None} | {name: value}
    with pytest.raises(InvalidArgumentError, match=rf"{name}=.*: give a whole number of at least 1"):
        agreed_sizes(Ranks(), **given)
