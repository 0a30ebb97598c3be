"""The journal: a search goes on from what it knows."""

import contextlib
import json

import pytest
from journals import Runner, journal

from mlx_tune.batching.journal_lines import interrupted, started
from mlx_tune.batching.result import Trial
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.memory import MemoryBudget


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


def test_a_trial_that_an_earlier_restart_knew_of_stays_unfit(tmp_path):
    journal(tmp_path / "j", Runner()).trial(4, None, 2)
    with (tmp_path / "j").open("a") as file:
        file.write(started(64))
    journal(tmp_path / "j", Runner()).trial(8, None, 2)
    assert not journal(tmp_path / "j", Runner()).trial(64, None, 2)[-1].fits


def test_a_trial_that_was_interrupted_from_outside_is_measured_again(tmp_path):
    journal(tmp_path / "j", Runner())
    with (tmp_path / "j").open("a") as file:
        file.write(started(64) + interrupted(64))
    runner = Runner()
    journal(tmp_path / "j", runner).trial(64, None, 2)
    assert runner.tried == [64]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "j"):
        with pytest.raises(InvalidArgumentError, match=r"journal='.*' cannot be read and written: .*Name a file in"):
            journal(path, Runner())


@pytest.fixture(scope="module")
def unsynced():
    """Thousands of files: they need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.mark.usefixtures("unsynced")
def test_a_file_that_was_cut_off_anywhere_goes_on_with_its_whole_lines(tmp_path):
    whole = tmp_path / "whole"
    note = journal(whole, Runner(fails=[9]))
    note.trial(4, None, 2)
    with contextlib.suppress(KeyboardInterrupt):
        note.trial(9, None, 2)
    note.trial(6, 60, 2)
    content = whole.read_bytes()
    for cut in range(len(content)):
        path = tmp_path / f"cut{cut}"
        path.write_bytes(content[:cut])
        runner = Runner()
        cut_off = journal(path, runner)
        lines = [json.loads(line) for line in content[: cut + 1].split(b"\n")[:-1]]  # but for the newline, it is there
        fits = {n: cut_off.trial(n, None, 2)[-1].fits for n in (4, 6, 9)}
        begun = {line["started"] for line in lines if "started" in line}
        done = {line.get("ended", line.get("interrupted")) for line in lines}
        assert fits == {n: n not in begun - done for n in (4, 6, 9)}, cut
        assert set(runner.tried) == {4, 6, 9} - begun | {9} & done, cut
        assert all(json.loads(line) for line in path.read_bytes().splitlines()), cut
