"""The result: its table, its JSON, its picture."""

import json

import pytest

from mlx_tune.batching.result import AutobatchResult, Trial
from mlx_tune.errors import InvalidArgumentError

RESULT = AutobatchResult(
    batch_size=12,
    accumulation_steps=2,
    peak_bytes=970_000,
    limit_bytes=900_000,
    cache_limit_bytes=30_000,
    budget_bytes=1_000_000,
    budget_source="1.00 MB (given)",
    seconds=0.1,
    items_per_second=7680.0,
    unit="tokens",
    trials=(
        Trial(1, 60_000, 1_000_000, 90_000, 0.02, True, 64, floor_bytes=60_000, held_bytes=61_000, steps=1),
        Trial(12, 960_000, 950_000, 1_010_000, 0.1, False, 768, floor_bytes=955_000, held_bytes=960_000, steps=1),
        Trial(12, 960_000, 900_000, 970_000, 0.1, True, 768, floor_bytes=955_000, held_bytes=960_000, steps=2),
        Trial(24, None, 1_000_000, reason="its process was ended by SIGKILL"),
    ),
    next_size=24,
    next_bytes=1_900_000,
    next_measured=False,
    search_seconds=1.5,
    notes=("a note",),
)

TABLE = """\
batch size 12 x 2 accumulation steps = 24: peak 970 kB of 1.00 MB
batch  predicted    floor     peak    limit     step  tokens/s  fits
-----  ---------  -------  -------  -------  -------  --------  ------------------------------------
    1    60.0 kB  60.0 kB  90.0 kB  1.00 MB  20.0 ms     3,200  yes
   12     960 kB   955 kB  1.01 MB   950 kB   100 ms     7,680  no
   12     960 kB   955 kB   970 kB   900 kB   100 ms     7,680  yes, chosen
   24                               1.00 MB                     no: its process was ended by SIGKILL
budget: 1.00 MB (given); hold the limit with result.applied()
batch 24: predicted at least 1.90 MB, not tried
largest batch that ran without being held back by the limit: 1
a note"""


def test_the_table_says_what_was_tried_and_what_it_left_open():
    assert str(RESULT) == TABLE


def test_the_dictionary_survives_json():
    read = json.loads(json.dumps(RESULT.to_dict()))
    assert read["batch_size"] == 12
    assert read["trials"][0]["items_per_second"] == 3200.0
    assert [trial["fits"] for trial in read["trials"]] == [True, False, True, False]
    assert read["notes"] == ["a note"]


@pytest.mark.parametrize("dark", [False, True])
def test_the_picture_has_the_line_the_points_and_the_budget(tmp_path, dark):
    figure = RESULT.plot(tmp_path / "search.svg", dark=dark)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["predicted", "floor", "measured", "budget"]
    assert (tmp_path / "search.svg").read_text().startswith("<?xml")
    with pytest.raises(InvalidArgumentError, match=r"search\.gif"):
        RESULT.plot(tmp_path / "search.gif")
