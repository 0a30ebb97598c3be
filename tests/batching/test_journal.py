"""The journal: a search goes on from what it knows."""

import contextlib
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.batching.journal import Journal
from mlx_tune.batching.journal_lines import ended, header_line, interrupted, started
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


FIRST = header_line(1000, "given")
WHOLE = ended(4, [Trial(4, None, limit_bytes=900, peak_bytes=40, steps=2, fits=True)])
TRIAL = json.loads(WHOLE)["trials"][0]


def of_trials(*trials):
    return json.dumps({"ended": 4, "trials": list(trials)})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("not json\n", "line 1: it exists and is no journal of autobatch"),
        ('{"some": "file"}\n', "line 1: it exists and is no journal of autobatch"),
        ('["mlx_tune_autobatch"]\n', "line 1: it exists and is no journal of autobatch"),
        ("7", "line 1: it exists and is no journal of autobatch"),
        ('{"mlx_tune_autobatch": true, "budget_bytes": 1}\n', "line 1: it exists and is no journal of autobatch"),
        (
            FIRST.replace(" 1,", " 2,"),
            "line 1: another version of mlx_tune wrote it, in format 2 where this one reads 1",
        ),
        (FIRST.replace("1000", '"1kB"'), "line 1: budget_bytes='1kB' from source='given' is no budget"),
        (FIRST + "garbage\n", "line 2: it is none of the objects that a journal holds"),
        (FIRST + WHOLE + "12\n" + WHOLE, "line 3: it is none of the objects that a journal holds"),
        (FIRST + "{}\n", "line 2: it is none of the objects that a journal holds"),
        (FIRST + "garbage", "line 2: it is none of the objects that a journal holds"),
        (FIRST + "[" * 10**5 + "\n", "line 2: it is none of the objects that a journal holds"),
        (FIRST + '{"started": "four"}\n', "line 2: started='four' is no batch size"),
        (FIRST + '{"started": true}\n', "line 2: started=True is no batch size"),
        (FIRST + '{"ended": 4}\n', "line 2: batch size 4 ended without trials"),
        (FIRST + of_trials() + "\n", "line 2: batch size 4 ended without trials"),
        (FIRST + of_trials(TRIAL, 3) + "\n", "line 2: batch size 4 ended without trials"),
        (
            FIRST + of_trials({k: v for k, v in TRIAL.items() if k != "fits"}),
            "line 2: a trial of batch size 4 has no fits",
        ),
        (FIRST + of_trials(TRIAL | {"steps": "2"}), "line 2: a trial of batch size 4 has steps='2', which is no such"),
        (FIRST + of_trials(TRIAL | {"seconds": float("nan")}), "line 2: a trial of batch size 4 has seconds=nan"),
        (
            FIRST + of_trials(TRIAL | {"peak_bytes": None}),
            "line 2: a trial of batch size 4 is of batch size 4, or fits",
        ),
        (FIRST + of_trials(TRIAL | {"batch_size": 5}), "line 2: a trial of batch size 4 is of batch size 5"),
    ],
)
def test_a_file_that_is_no_journal_is_left_alone_and_its_line_named(tmp_path, text, why):
    (tmp_path / "j").write_text(text)
    with pytest.raises(InvalidArgumentError, match=re.escape(f"journal={str(tmp_path / 'j')!r}, {why}")) as caught:
        journal(tmp_path / "j", Runner())
    assert re.search(r"left as it is: name another|take that line out", str(caught.value))
    assert (tmp_path / "j").read_text() == text


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "j"):
        with pytest.raises(InvalidArgumentError, match=r"journal='.*' cannot be read and written: .*Name a file in"):
            journal(path, Runner())


_SCALAR = st.none() | st.booleans() | st.integers(-3, 10) | st.integers() | st.floats() | st.text(max_size=5)
_KEYS = st.sampled_from(["mlx_tune_autobatch", "budget_bytes", "source", "started", "ended", "interrupted", "trials"])
_JSON = st.recursive(
    _SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=6
)
_TRIALS = st.dictionaries(st.sampled_from(list(TRIAL)), _SCALAR, max_size=2).map(lambda changes: TRIAL | changes)


@pytest.fixture(scope="module")
def unsynced():
    """Thousands of files: they need not outlive a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.mark.usefixtures("unsynced")
@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(_JSON, max_size=4).map(lambda values: "\n".join(json.dumps(v) for v in values).encode()),
        st.lists(_JSON, max_size=4).map(lambda v: (FIRST + "\n".join(map(json.dumps, v))).encode()),
        st.fixed_dictionaries(
            {"ended": st.just(4) | _JSON, "trials": st.lists(_JSON | _TRIALS, max_size=2) | _JSON}
        ).map(lambda record: (FIRST + json.dumps(record) + "\n").encode()),
        st.binary(max_size=40).map(lambda end: (FIRST + WHOLE).encode() + end),
    )
)
def test_whatever_a_file_holds_it_is_read_or_refused(content):
    """And what is read is used: a size that is known has a last trial, one that fits has a peak."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        path.write_bytes(content)
        try:
            note = journal(path, Runner(), asked=None)
        except InvalidArgumentError as error:
            refused = str(error)
        else:
            refused = None
        if refused is not None:
            assert re.search(r"j', line \d+: ", refused)
            assert path.read_bytes() == content
            return
        assert int(note.budget) > 0
        for size in note._known:
            trial = note.trial(size, None, 0)[-1]
            assert trial.batch_size == size
            assert trial.peak_bytes is not None or not trial.fits
        note.trial(3, None, 2)
        journal(path, Runner(), asked=None)  # what was written to it reads well


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
