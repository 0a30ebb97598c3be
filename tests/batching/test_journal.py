"""The journal: a search goes on from what it knows."""

import json
import re

import pytest

from mlx_tune.batching.journal import Journal
from mlx_tune.batching.result import Trial
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.memory import MemoryBudget

BUDGET = MemoryBudget(1000)


class Runner:
    def __init__(self, fails=()):
        self.tried, self.fails = [], fails

    def trial(self, size, predicted_bytes, steps):
        self.tried.append(size)
        if size in self.fails:
            raise KeyboardInterrupt
        return [
            Trial(size, predicted_bytes, limit_bytes=900, peak_bytes=10 * size, steps=steps, fits=10 * size <= 1000)
        ]


def journal(path, runner, asked="1kB", resolved=BUDGET):
    note = Journal(path, asked=asked, resolved=resolved)
    note.runner = runner
    return note


def test_what_is_known_is_not_measured_again(tmp_path):
    first, second = Runner(), Runner()
    journal(tmp_path / "j", first).trial(4, None, 2)
    trials = journal(tmp_path / "j", second).trial(4, 40, 2)
    assert (first.tried, second.tried) == ([4], [])
    assert trials[-1] == Trial(4, None, limit_bytes=900, peak_bytes=40, steps=2, fits=True)


def test_more_steps_than_were_taken_are_measured(tmp_path):
    runner = Runner()
    note = journal(tmp_path / "j", runner)
    note.trial(4, None, 1)
    note.trial(4, None, 2)
    assert runner.tried == [4, 4]


def test_a_trial_that_took_the_machine_down_does_not_fit(tmp_path):
    journal(tmp_path / "j", Runner()).trial(4, None, 2)
    with (tmp_path / "j").open("a") as file:
        file.write('{"started": 64}\n{"ended": 64, "tri')  # and the line after it was being written
    runner = Runner()
    trial = journal(tmp_path / "j", runner).trial(64, None, 2)[-1]
    assert not trial.fits
    assert trial.reason == "an earlier search did not survive this trial"
    assert runner.tried == []


def test_an_interrupted_trial_is_measured_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        journal(tmp_path / "j", Runner(fails=[4])).trial(4, None, 2)
    runner = Runner()
    assert journal(tmp_path / "j", runner).trial(4, None, 2)[-1].fits
    assert runner.tried == [4]


def test_another_budget_is_refused_and_none_takes_the_journals(tmp_path):
    journal(tmp_path / "j", Runner()).trial(4, None, 2)
    with pytest.raises(
        InvalidArgumentError, match=r"under a budget of 1\.00 kB, this search has 2\.00 kB: give the same"
    ):
        journal(tmp_path / "j", Runner(), asked="2kB", resolved=MemoryBudget(2000))
    note = journal(tmp_path / "j", Runner(), asked=None, resolved=MemoryBudget(2000))
    assert note.budget == 1000
    assert "from the journal" in str(note.budget)


@pytest.mark.parametrize("text", ["not json\n", json.dumps({"some": "file"}) + "\n"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, text):
    (tmp_path / "j").write_text(text)
    with pytest.raises(InvalidArgumentError, match=re.escape("exists and is no journal of autobatch")):
        journal(tmp_path / "j", Runner())
    assert (tmp_path / "j").read_text() == text
