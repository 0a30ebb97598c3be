"""The error for a step that does not fit, on floors that are made up."""

from types import SimpleNamespace

import pytest

from mlx_tune.checkpointing.planning.survey import does_not_fit


@pytest.mark.parametrize("budget", [1000, 1130, 1230, 2000, 5000])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 9, 64])
def test_the_batch_that_would_fit_is_the_largest_smaller_one_with_the_margin(batch_size, budget):
    asked = []

    def floor(choice, size=batch_size):
        asked.append(size)
        return 1000 + 97 * size

    bar = SimpleNamespace(update=lambda text: None)
    survey = SimpleNamespace(floor=floor, all=(True,), batch_size=batch_size, paths=("layers.0",), bar=bar)
    error = does_not_fit(survey, budget)
    fitting = [size for size in range(1, batch_size) if 1.03 * (1000 + 97 * size) <= budget]
    expected = f"Batch size {fitting[-1]} would fit that way" if fitting else "Not even batch size 1 would"
    assert expected in str(error)
    assert (error.needed_bytes, error.budget_bytes) == (1000 + 97 * batch_size, budget)
    assert max(asked) == batch_size
