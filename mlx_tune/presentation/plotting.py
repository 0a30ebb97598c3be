"""The little that every `plot()` shares: a figure in a light or a dark dress, and saving it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_tune.errors import InvalidArgumentError, MissingDependencyError
from mlx_tune.files.scratch import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Distinguishable in both dresses and by colour-blind readers (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")

_INK = {False: "#1f2328", True: "#e6edf3"}
_GRID = {False: "#d0d7de", True: "#3d444d"}


def new_figure(*, dark: bool = False, size: tuple[float, float] = (6.4, 4.0), rows: int = 1) -> tuple[Figure, Axes]:
    """Make a figure, without touching matplotlib's global state.

    Args:
        dark: Light ink on a transparent ground, for dark pages.
        size: Width and height in inches.
        rows: The number of pairs of axes, one under the other with a common x axis.

    Returns:
        The figure and its first pair of axes; `figure.axes` has all of them.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError(
            "plot() needs matplotlib, which is not installed. Install it with: pip install 'mlx-tune-kit[plot]'"
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    for axes in figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]:
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=_INK[dark])
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_color(_INK[dark])
        for spine in axes.spines.values():
            spine.set_color(_GRID[dark])
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(True, color=_GRID[dark], linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, figure.axes[0]


def ink(dark: bool) -> str:
    """The colour of text and of thin lines."""
    return _INK[dark]


def bytes_unit(nbytes: float) -> tuple[float, str]:
    """The unit that an axis of memory is labelled in.

    Examples:
        >>> bytes_unit(60_000_000)
        (1000000.0, 'MB')
    """
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= scale:
            return scale, unit
    return 1.0, "bytes"


def save_figure(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write the figure where a path is given, and hand it back.

    Args:
        figure: The figure that `new_figure` made.
        path: A file that ends in .svg or .png, or None for no file.

    Raises:
        InvalidArgumentError: Another ending.
        DiskError: The disk is full, or the folder cannot be written to.
    """
    if path is None:
        return figure
    suffix = Path(path).suffix.lower()
    if suffix not in {".svg", ".png"}:
        raise InvalidArgumentError(f"Cannot write a picture to {str(path)!r}: the name must end in .svg or .png.")
    # A fixed salt, no date and no version make the same picture the same file: version control shows real changes only.
    from matplotlib import rc_context

    place = Path(path)
    with writing(place.parent, "The picture", way_out="Name a file in another folder."):
        with rc_context({"svg.hashsalt": "mlx_tune", "svg.fonttype": "path"}):
            figure.savefig(place, dpi=160, metadata={"Date": None, "Creator": None} if suffix == ".svg" else None)
        if suffix == ".svg":
            place.write_text(_shorter(place.read_text(encoding="utf-8")), encoding="utf-8")
    return figure


def _shorter(svg: str) -> str:
    """The same picture in fewer bytes: coordinates to a hundredth of a point, and a path on one line."""

    def short(found: re.Match[str]) -> str:
        value = re.sub(r"([.][0-9]{2})[0-9]+", r"\1", " ".join(found[2].split()))
        return f' {found[1]}="{value}"'

    return re.sub(r' (d|x|y)="([^"]*)"', short, svg)
