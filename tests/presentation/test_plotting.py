import pytest

from mlx_tune.errors import DiskError, InvalidArgumentError
from mlx_tune.presentation.plotting import bytes_unit, ink, new_figure, save_figure

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("nbytes", "unit"), [(0, "bytes"), (999, "bytes"), (1e3, "kB"), (1e6 - 1, "kB"), (1e6, "MB"), (5e12, "GB")]
)
def test_an_axis_has_the_largest_unit_that_is_not_above_it(nbytes, unit):
    scale, name = bytes_unit(nbytes)
    assert name == unit
    assert scale == {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_both_dresses_have_an_ink_of_their_own_on_no_ground():
    assert ink(dark=True) != ink(dark=False)
    for dark in (False, True):
        figure, axes = new_figure(dark=dark, rows=2)
        assert len(figure.axes) == 2
        assert axes.title.get_color() == ink(dark)
        assert figure.patch.get_alpha() == axes.patch.get_alpha() == 0


def test_the_same_picture_is_the_same_file(tmp_path):
    for name in ("one.svg", "two.svg", "one.png"):
        figure, axes = new_figure()
        axes.plot([0, 1.23456789], [0, 1])
        assert save_figure(figure, tmp_path / name) is figure
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"<date>" not in (tmp_path / "one.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_an_svg_or_a_png_in_a_folder_that_is_there(tmp_path):
    figure, _ = new_figure()
    assert save_figure(figure, None) is figure
    with pytest.raises(InvalidArgumentError, match=r"picture\.pdf.*\.svg or \.png"):
        save_figure(figure, tmp_path / "picture.pdf")
    with pytest.raises(DiskError, match="another folder"):
        save_figure(figure, tmp_path / "missing" / "picture.svg")
    assert list(tmp_path.iterdir()) == []
