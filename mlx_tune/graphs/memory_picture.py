"""The picture of a step's memory: bytes alive over its operations, and who holds them at the peak."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mlx_tune.presentation.plotting import COLORS, bytes_unit, ink, new_figure, save_figure
from mlx_tune.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The colours of the purposes, in their order; the fourth is other state.
_COLORS = (*COLORS[:3], "#8c959f", *COLORS[3:])

#: Purposes that never hold more than this share of the peak are not drawn on their own.
_VISIBLE = 0.005

#: Neighbouring operations share a column where there are more than could be told apart; the most they hold is drawn.
_COLUMNS = 400


def draw_memory(
    live_by_purpose: dict[str, tuple[int, ...]],
    at_peak: dict[str, int],
    peak_operation: int,
    largest: list[str],
    path: str | os.PathLike[str] | None,
    *,
    dark: bool,
) -> Figure:
    """Draw memory over a step's operations.

    Args:
        live_by_purpose: For each purpose the bytes alive while each operation runs.
        at_peak: The peak's bytes by purpose.
        peak_operation: The position of the operation at which it is reached; -1 before the first.
        largest: A line for each of the largest owners of the peak.
        path: An .svg or .png file to write as well.
        dark: For dark pages.
    """
    peak_bytes, operations = sum(at_peak.values()), max(map(len, live_by_purpose.values()), default=0)
    figure, axes = new_figure(dark=dark, size=(6.4, 5.8))
    grid = figure.add_gridspec(2, 1, height_ratios=(2.5, 1))
    axes.set_subplotspec(grid[0])
    scale, unit = bytes_unit(peak_bytes)
    colors = dict(zip(live_by_purpose, _COLORS, strict=True))
    # From the highest down, each over the last: every area then needs the points of its own outline only.
    for name, top in reversed(_tops(live_by_purpose, peak_bytes).items()):
        edges, heights = _columns(top)
        label = f"{name}, {format_bytes(at_peak[name])}"
        axes.stairs([height / scale for height in heights], edges, fill=True, color=colors[name], lw=0, label=label)
    floor = peak_bytes / scale
    axes.axhline(floor, color=ink(dark), linewidth=0.8, linestyle="--")
    axes.plot([max(peak_operation, 0) + 0.5], [floor], "v", color=ink(dark), markersize=6)
    axes.set_xlabel("operations, in the order of evaluation", color=ink(dark))
    axes.set_ylabel(f"memory ({unit})", color=ink(dark))
    axes.set_xlim(0, max(operations, 1))
    axes.set_ylim(0, floor * 1.08)
    axes.set_title(f"floor: {format_bytes(peak_bytes)}", color=ink(dark), loc="left", fontsize=11)

    below = figure.add_subplot(grid[1])
    below.axis("off")
    below.text(0, 1, "at the peak", color=ink(dark), fontsize=9, va="top", transform=below.transAxes)
    handles, labels = axes.get_legend_handles_labels()
    below.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(-0.01, 0.9),
        ncols=3,
        columnspacing=1.2,
        frameon=False,
        labelcolor=ink(dark),
        fontsize=9,
        borderaxespad=0,
    )
    lines = ["largest of it", *largest]
    rows = -(-len(labels) // 3)
    below.text(
        0, 0.84 - 0.14 * rows, "\n".join(lines), color=ink(dark), fontsize=9, va="top", transform=below.transAxes
    )
    return save_figure(figure, path)


def _tops(live_by_purpose: dict[str, tuple[int, ...]], peak_bytes: int) -> dict[str, list[int]]:
    """Upper edges of the stacked purposes; those that could not be seen lie under the next that can."""
    tops: dict[str, list[int]] = {}
    top: Iterable[int] = itertools.repeat(0)
    for name, live in live_by_purpose.items():
        top = [a + b for a, b in zip(top, live, strict=False)]
        if max(live, default=0) > _VISIBLE * peak_bytes:
            tops[name] = top
    return tops


def _columns(values: list[int]) -> tuple[list[int], list[int]]:
    """Edges and heights of at most `_COLUMNS` columns; neighbours of the same height are one."""
    width = -(-len(values) // _COLUMNS) or 1
    edges, heights = [0], list[int]()
    for start in range(0, len(values), width):
        height = max(values[start : start + width])
        if heights and heights[-1] == height:
            edges.pop()
        else:
            heights.append(height)
        edges.append(min(start + width, len(values)))
    return edges, heights
