import inspect

import pytest

from mlx_tune import errors

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_one_name_catches_all_of_them(kind):
    with pytest.raises(errors.MlxTuneError, match="the text"):
        raise kind("the text")


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (errors.InvalidArgumentError, ValueError),
        (errors.QuantizationError, ValueError),
        (errors.MissingDependencyError, ImportError),
        (errors.BudgetError, MemoryError),
        (errors.DiskError, OSError),
        (errors.BackendError, RuntimeError),
        (errors.TraceError, RuntimeError),
    ],
)
def test_code_that_knows_nothing_of_this_library_catches_what_it_expects(kind, known):
    with pytest.raises(known):
        raise kind("the text")


def test_figures_go_with_the_text():
    budget = errors.BudgetError("too much", needed_bytes=3, budget_bytes=2)
    assert (str(budget), budget.needed_bytes, budget.budget_bytes) == ("too much", 3, 2)
    disk = errors.DiskError("full", folder="/tmp", needed_bytes=5, free_bytes=4)
    assert (str(disk), disk.folder, disk.needed_bytes, disk.free_bytes) == ("full", "/tmp", 5, 4)
