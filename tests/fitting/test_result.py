"""The sentences of a fit: they claim no more than the table beside them."""

import dataclasses
import json

import pytest

from mlx_tune.fitting.result import Fit, Setting

CHOSEN = Setting(4, 1, 500_000, 40.0, 900_000, 800_000, 0.1, 40.0, True, behind=0.006, uncertainty=0.002, chosen=True)
FASTEST = Setting(8, 0, 700_000, 41.0, 950_000, 940_000, 0.2, 40.2, True, behind=0.0, uncertainty=0.0)
SLOW = Setting(2, 2, 300_000, 10.0, 900_000, 400_000, 0.2, 10.0, True, behind=3.06, uncertainty=0.02)
DIED = Setting(16, 0, 990_000, 50.0, 900_000, fits=False)


def fit(*settings):
    (chosen,) = [s for s in settings if s.chosen]
    return Fit(
        batch_size=chosen.batch_size,
        accumulation_steps=1,
        paths=("layers.0",) * chosen.checkpointed,
        found=2,
        limit_bytes=900_000,
        cache_limit_bytes=None,
        budget_bytes=1_000_000,
        budget_source="1.00 MB (given)",
        predicted_peak_bytes=chosen.floor_bytes,
        peak_bytes=chosen.peak_bytes,
        predicted_rate=40.0,
        measured_rate=40.0,
        measured_seconds=0.1,
        unit="rows",
        trials=settings,
        search_seconds=1.0,
        notes=("a note",),
        _model=None,
    )


TABLE = """\
Chosen within 1.00 MB: batch size 4, 1 of 2 blocks checkpointed, 40 rows/s
batch  checkpointed   floor  predicted rows/s    peak    step  measured rows/s  time a row
-----  ------------  ------  ----------------  ------  ------  ---------------  --------------  -----------------
    2        2 of 2  300 kB                10  400 kB  200 ms               10  +306.0% ± 2.0%
    4        1 of 2  500 kB                40  800 kB  100 ms               40  +0.6% ± 0.2%    chosen
    8        0 of 2  700 kB                41  940 kB  200 ms               40  fastest
   16        0 of 2  990 kB                50                                                   ran out of memory
Budget: 1.00 MB (given).
Floor: the least memory that a step needs, from its graph. Time a row: how much longer than under the fastest setting, \
with the standard error, where both ran in turns.
Not the fastest was chosen, but one that counts as equally fast (+0.6%): its peak is lower.
Peak: at least 500 kB predicted, 800 kB measured under a memory limit of 900 kB: in Python, train inside fit.applied().
a note"""


def test_the_table_says_what_was_chosen_and_why_it_is_not_the_fastest():
    assert str(fit(SLOW, CHOSEN, FASTEST, DIED)) == TABLE


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([dataclasses.replace(FASTEST, chosen=True), SLOW], None),
        ([dataclasses.replace(CHOSEN, behind=None), FASTEST], None),
        ([CHOSEN, dataclasses.replace(FASTEST, peak_bytes=700_000)], "only where they are clearly faster"),
        ([CHOSEN, FASTEST], "its peak is lower"),
    ],
)
def test_a_reason_is_given_only_where_another_came_in_faster(settings, said):
    text = str(fit(*settings))
    assert ("Not the fastest was chosen" in text) == (said is not None)
    assert said is None or said in text


def test_the_dictionary_survives_json():
    read = json.loads(json.dumps(fit(SLOW, CHOSEN, DIED).to_dict()))
    assert [s["fits"] for s in read["trials"]] == [True, True, False]
    assert read["trials"][2]["peak_bytes"] is None
