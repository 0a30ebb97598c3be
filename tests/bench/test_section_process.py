import pytest

from mlx_tune.bench import section_process
from mlx_tune.diagnosis.child_answers import NoAnswerError, ask

MODULE = section_process.__name__


def test_a_section_answers_out_of_a_process_of_its_own():
    answer = ask(MODULE, "unified", "toy", seconds=120)
    assert answer["figures"]["array_bytes"] == 64 * 64 * 4
    assert answer["left_out"] == ""
    assert answer["seconds"] > 0
    assert answer["peak_bytes"] >= 64 * 64 * 4


@pytest.mark.cpu_only
def test_one_that_is_left_out_says_why():
    answer = ask(MODULE, "wiring", "toy", seconds=120)
    assert answer["figures"] is None
    assert "nothing to wire" in answer["left_out"]


def test_one_that_does_not_exist_dies_and_says_so():
    with pytest.raises(NoAnswerError, match="There is no section 'speed'"):
        ask(MODULE, "speed", "toy", seconds=120)
