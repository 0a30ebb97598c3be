"""The picture of a step's memory: bytes alive over its operations, and who holds them at the peak."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mlx_tune.plotting import COLORS, ink, new_figure, save_figure
from mlx_tune.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_tune.graphs.estimate import MemoryEstimate


def draw(estimate: MemoryEstimate, path: str | os.PathLike[str] | None, *, dark: bool) -> Figure:
    """Draw an estimate; see `MemoryEstimate.plot`."""
    figure, axes = new_figure(dark=dark, size=(10.0, 4.8))
    scale, unit = _unit(estimate.floor_bytes)
    steps = range(len(estimate.live_bytes))
    live = [n / scale for n in estimate.live_bytes]
    axes.fill_between(steps, live, step="mid", color=COLORS[0], alpha=0.25, linewidth=0)
    axes.step(steps, live, where="mid", color=COLORS[0], linewidth=1.2)
    axes.axhline(estimate.floor_bytes / scale, color=COLORS[3], linewidth=1, linestyle="--")
    at = max(estimate.peak_operation, 0)
    axes.plot([at], [estimate.floor_bytes / scale], "o", color=COLORS[3], markersize=5)
    axes.set_xlabel("operations, in the order of evaluation", color=ink(dark))
    axes.set_ylabel(f"memory ({unit})", color=ink(dark))
    axes.set_xlim(0, max(len(live) - 1, 1))
    axes.set_ylim(0, estimate.floor_bytes / scale * 1.12)
    axes.set_title(f"floor {format_bytes(estimate.floor_bytes)}", color=ink(dark), loc="left", fontsize=11)
    lines = ["at the peak:"]
    lines += [f"{format_bytes(n):>9}  {name}" for name, n in estimate.by_purpose.items() if n]
    lines += ["", "largest:"]
    for owner, count in estimate.largest_owners(6):
        what = owner.operation or owner.label
        lines.append(
            f"{format_bytes(owner.nbytes * count):>9}  {f'{count} x ' if count > 1 else ''}{what} {list(owner.shape)}"
        )
    figure.text(
        1.01,
        0.5,
        "\n".join(lines),
        color=ink(dark),
        family="monospace",
        fontsize=7.5,
        va="center",
        ha="left",
        transform=axes.transAxes,
    )
    return save_figure(figure, path)


def _unit(nbytes: int) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= scale:
            return scale, unit
    return 1.0, "bytes"
