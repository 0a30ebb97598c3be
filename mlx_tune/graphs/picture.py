"""The picture of a step's memory: bytes alive over its operations, and who holds them at the peak."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mlx_tune.graphs.floor import PURPOSES
from mlx_tune.plotting import COLORS, bytes_unit, ink, new_figure, save_figure
from mlx_tune.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_tune.graphs.estimate import MemoryEstimate


_COLORS = dict(zip(PURPOSES, (*COLORS[:3], "#8c959f", *COLORS[3:]), strict=True))

#: Purposes that never hold more than this share of the peak are not drawn on their own.
_VISIBLE = 0.005

#: Neighbouring operations share a column where there are more than could be told apart; the most they hold is drawn.
_COLUMNS = 400


def draw(estimate: MemoryEstimate, path: str | os.PathLike[str] | None, *, dark: bool) -> Figure:
    """Draw an estimate; see `MemoryEstimate.plot`."""
    figure, axes = new_figure(dark=dark, size=(6.4, 5.8))
    grid = figure.add_gridspec(2, 1, height_ratios=(2.5, 1))
    axes.set_subplotspec(grid[0])
    scale, unit = bytes_unit(estimate.floor_bytes)
    tops = _tops(estimate)
    # From the highest down, each over the last: every area then needs the points of its own outline only.
    for name, top in reversed(tops.items()):
        edges, heights = _columns(top)
        label = f"{name}, {format_bytes(estimate.by_purpose[name])}"
        axes.stairs([height / scale for height in heights], edges, fill=True, color=_COLORS[name], lw=0, label=label)
    floor = estimate.floor_bytes / scale
    axes.axhline(floor, color=ink(dark), linewidth=0.8, linestyle="--")
    axes.plot([max(estimate.peak_operation, 0) + 0.5], [floor], "v", color=ink(dark), markersize=6)
    axes.set_xlabel("operations, in the order of evaluation", color=ink(dark))
    axes.set_ylabel(f"memory ({unit})", color=ink(dark))
    axes.set_xlim(0, max(len(estimate.live_bytes), 1))
    axes.set_ylim(0, floor * 1.08)
    axes.set_title(f"floor: {format_bytes(estimate.floor_bytes)}", color=ink(dark), loc="left", fontsize=11)

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
    lines = ["largest of it"]
    for owner, count in estimate.largest_owners(6):
        times = f" x {count}" if count > 1 else ""
        what = owner.operation or owner.label
        lines.append(f"{format_bytes(owner.nbytes * count)}  {what}, {list(owner.shape)}{times}, {owner.place}")
    rows = -(-len(labels) // 3)
    below.text(
        0, 0.84 - 0.14 * rows, "\n".join(lines), color=ink(dark), fontsize=9, va="top", transform=below.transAxes
    )
    return save_figure(figure, path)


def _tops(estimate: MemoryEstimate) -> dict[str, list[int]]:
    """Upper edges of the stacked purposes; those that could not be seen lie under the next that can."""
    top = [0] * len(estimate.live_bytes)
    tops: dict[str, list[int]] = {}
    for name, live in estimate.live_by_purpose.items():
        top = [a + b for a, b in zip(top, live, strict=True)]
        if max(live, default=0) > _VISIBLE * estimate.floor_bytes:
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
