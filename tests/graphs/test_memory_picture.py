import pytest

from mlx_tune.graphs.memory_picture import draw_memory
from mlx_tune.graphs.simulating.allocator import PURPOSES

pytest.importorskip("matplotlib")

LIVE = dict.fromkeys(PURPOSES, (0, 0, 0, 0)) | {"parameters": (40, 40, 40, 40), "activations": (0, 30, 60, 20)}
PEAK = dict.fromkeys(PURPOSES, 0) | {"parameters": 40, "activations": 60}


def test_areas_lie_on_one_another_up_to_the_peak():
    figure = draw_memory(LIVE, PEAK, 2, ["the largest"], None, dark=False)
    axes = figure.axes[0]
    tops = {patch.get_label().split(",")[0]: list(patch.get_data().values) for patch in axes.patches}
    assert tops == {"parameters": [40], "activations": [40, 70, 100, 60]}  # of one height: one column
    assert "activations, 60 B" in {patch.get_label() for patch in axes.patches}
    dashed, mark = axes.lines
    assert set(dashed.get_ydata()) == {100}
    assert list(mark.get_xydata()[0]) == [2.5, 100]


def test_where_there_are_more_operations_than_columns_each_shows_the_most_it_holds():
    live = dict.fromkeys(PURPOSES, (0,) * 5000) | {"activations": tuple(1 + (i == 3333) for i in range(5000))}
    figure = draw_memory(live, dict.fromkeys(PURPOSES, 0) | {"activations": 2}, 3333, [], None, dark=True)
    heights = list(figure.axes[0].patches[0].get_data().values)
    assert len(heights) <= 400
    assert (max(heights), heights.count(2)) == (2, 1)
