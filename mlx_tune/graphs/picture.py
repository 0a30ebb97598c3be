"""The picture of a step's memory: bytes alive over its operations, and who holds them at the peak."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mlx_tune.graphs.floor import PURPOSES
from mlx_tune.plotting import COLORS, ink, new_figure, save_figure
from mlx_tune.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_tune.graphs.estimate import MemoryEstimate


_COLORS = dict(zip(PURPOSES, (*COLORS[:3], "#8c959f", *COLORS[3:]), strict=True))

#: Purposes that never hold more than this share of the peak are not drawn on their own.
_VISIBLE = 0.005


def draw(estimate: MemoryEstimate, path: str | os.PathLike[str] | None, *, dark: bool) -> Figure:
    """Draw an estimate; see `MemoryEstimate.plot`."""
    figure, axes = new_figure(dark=dark, size=(10.0, 4.8))
    scale, unit = _unit(estimate.floor_bytes)
    tops = _tops(estimate)
    # From the highest down, each over the last: every area then needs the points of its own outline only.
    for name, top in reversed(tops.items()):
        color = _COLORS[name]
        label = f"{name}, {format_bytes(estimate.by_purpose[name])}"
        steps = [i for i, n in enumerate(top) if i in (0, len(top) - 1) or n != top[i - 1]]
        heights = [top[i] / scale for i in steps]
        axes.fill_between(steps, heights, step="post", color=color, linewidth=0, label=label)
    floor = estimate.floor_bytes / scale
    axes.axhline(floor, color=ink(dark), linewidth=0.8, linestyle="--")
    axes.plot([max(estimate.peak_operation, 0)], [floor], "v", color=ink(dark), markersize=6)
    axes.set_xlabel("operations, in the order of evaluation", color=ink(dark))
    axes.set_ylabel(f"memory ({unit})", color=ink(dark))
    axes.set_xlim(0, max(len(estimate.live_bytes) - 1, 1))
    axes.set_ylim(0, floor * 1.08)
    axes.set_title(f"floor: {format_bytes(estimate.floor_bytes)}", color=ink(dark), loc="left", fontsize=11)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        labelcolor=ink(dark),
        fontsize=8,
        title="at the peak",
        title_fontproperties={"size": 9},
        alignment="left",
    ).get_title().set_color(ink(dark))
    lines = ["largest at the peak"]
    for owner, count in estimate.largest_owners(7):
        what = owner.operation or owner.label
        times = f"{count} x " if count > 1 else ""
        lines.append(f"{format_bytes(owner.nbytes * count):>8}  {what}, {times}{list(owner.shape)}")
    axes.text(1.02, 0.0, "\n".join(lines), color=ink(dark), fontsize=8, va="bottom", transform=axes.transAxes)
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


def _unit(nbytes: int) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= scale:
            return scale, unit
    return 1.0, "bytes"
