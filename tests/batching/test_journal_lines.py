import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import Runner, journal

from mlx_tune.batching.journal_lines import ended, header_line
from mlx_tune.batching.result import Trial
from mlx_tune.errors import InvalidArgumentError

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
