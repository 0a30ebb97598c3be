"""The result: its table, its JSON, its picture."""

import dataclasses
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
        Trial(1, 60_000, 1_000_000, 90_000, 0.005, True, 64, floor_bytes=60_000, footprint_bytes=5_000_000, steps=1),
        Trial(12, 960_000, 950_000, 1_010_000, 0.1, False, 768, floor_bytes=955_000, held_bytes=960_000, steps=1),
        Trial(12, 960_000, 900_000, 970_000, 0.1, True, 768, floor_bytes=955_000, held_bytes=960_000, steps=2),
        Trial(24, None, 1_000_000, reason="its process was ended by SIGKILL"),
    ),
    next_size=24,
    next_bytes=1_900_000,
    next_measured=False,
    search_seconds=1.5,
    notes=("a note",),
    unhindered_size=3,
)
FREE = Trial(1, 60_000, 1_000_000, 90_000, 0.02, True, 64, floor_bytes=60_000, held_bytes=61_000, steps=1)

TABLE = """\
batch size 12 x 2 accumulation steps = 24: peak 970 kB of 1.00 MB
batch  predicted    floor     peak    limit     step  tokens/s  fits
-----  ---------  -------  -------  -------  -------  --------  ------------------------------------
    1    60.0 kB  60.0 kB  90.0 kB  1.00 MB  5.00 ms    12,800  yes
   12     960 kB   955 kB  1.01 MB   950 kB   100 ms     7,680  no
   12     960 kB   955 kB   970 kB   900 kB   100 ms     7,680  yes, chosen
   24                               1.00 MB                     no: its process was ended by SIGKILL
budget: 1.00 MB (given)
floor: the least that a step of that size needs
the peak holds under a memory limit of 900 kB: in Python, train inside result.applied()
batch 24 was not tried: it is predicted to need 1.90 MB
the limit makes batch 12 wait, and a token takes 67 % longer than at batch 1, the largest tried that never waits
batch 3 is predicted never to wait either; slowdown=0.05 asks for the largest batch that loses 5 % at most
the whole process took up to 5.00 MB: a peak counts MLX's arrays, not Python, libraries and buffers kept for reuse
a note"""


def test_the_table_says_what_was_tried_and_what_it_left_open():
    assert str(RESULT) == TABLE


def test_a_size_left_out_for_the_margin_says_so():
    near = dataclasses.replace(RESULT, next_bytes=990_000)
    assert "batch 24 was not tried: it is predicted to need 990 kB, too near the budget: on a GPU peaks" in str(near)


def test_the_time_of_the_search_is_told_apart():
    times = [dataclasses.replace(t, first_seconds=0.4, repeated_seconds=0.1) for t in RESULT.trials[:2]]
    found = with_trials(*times)
    assert "the search took 1.50 s: 800 ms in the first step of each size" in str(found)
    assert "200 ms in other steps" in str(found)
    assert found.to_dict()["first_seconds"] == 0.8


def with_trials(*trials):
    return dataclasses.replace(RESULT, trials=trials)


def test_an_answer_that_runs_free_says_nothing_of_speed():
    result = with_trials(FREE, dataclasses.replace(FREE, batch_size=12, seconds=0.1, items=768))
    assert result.slowdown == 0
    assert "wait" not in str(result)


def test_an_answer_that_loses_nothing_to_its_limit_asks_for_nothing():
    held = dataclasses.replace(RESULT.trials[2], seconds=0.06)
    result = with_trials(dataclasses.replace(FREE, seconds=0.006), held)
    assert result.slowdown < 0
    assert "the limit makes batch 12 wait, but a token takes no longer than at batch 1, the" in str(result)
    assert "slowdown=" not in str(result)


def test_where_nothing_runs_free_there_is_no_slowdown_to_tell():
    result = with_trials(RESULT.trials[2])
    assert result.slowdown is None
    assert "at each size that was tried the limit made MLX wait, so what waiting costs is not known" in str(result)


@pytest.mark.parametrize(("seconds", "said"), [(0.0602, "takes no longer"), (0.0607, "takes 1 % longer")])
def test_what_rounds_to_no_loss_is_none(seconds, said):
    held = dataclasses.replace(RESULT.trials[2], seconds=seconds)
    assert said in str(with_trials(dataclasses.replace(FREE, seconds=0.005), held))


def test_a_limit_of_one_byte_is_said_in_words():
    lowest = dataclasses.replace(RESULT.trials[2], limit_bytes=1)
    text = str(dataclasses.replace(with_trials(FREE, lowest), limit_bytes=1))
    assert "1 B" not in text
    assert "under the least possible limit MLX waits after each operation" in text
    assert "the peak holds under a memory limit of the least possible:" in text


def test_the_dictionary_survives_json():
    read = json.loads(json.dumps(RESULT.to_dict()))
    assert read["batch_size"] == 12
    assert read["trials"][0]["items_per_second"] == 12800.0
    assert read["slowdown"] == pytest.approx(2 / 3)
    assert read["unhindered_size"] == 3
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
