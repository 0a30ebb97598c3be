import pytest

from mlx_tune.diagnosis import explanations
from mlx_tune.diagnosis.explanations.known_error import KnownError


@pytest.mark.parametrize("entry", explanations.ENTRIES, ids=lambda entry: entry.name)
def test_each_entry_explains_its_own_example(entry):
    assert entry in explanations.find(entry.example)
    assert entry.remedies
    assert all(source.startswith("https://") for source in entry.sources)
    assert entry.sources


def test_a_pattern_is_looked_for_anywhere_and_in_any_case():
    entry = KnownError("a name", r"out of \w+ memory", "", "", (), ())
    assert entry.matches("RuntimeError: Out of GPU Memory at line 3")
    assert not entry.matches("out of memory")
