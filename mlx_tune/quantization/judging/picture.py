"""A quantization report as a picture: error against depth above, bytes by layer below."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from mlx_tune.plotting import COLORS, ink, new_figure, save_figure
from mlx_tune.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlx_tune.quantization.judging.report import LayerReport, QuantizationReport


def draw_report(
    report: QuantizationReport, path: str | os.PathLike[str] | None = None, *, dark: bool = False
) -> Figure:
    """Draw every layer's relative error against its place in the model, one colour for each kind, and its bytes.

    Args:
        report: The report to draw.
        path: Where to save it, as SVG or PNG by its ending; None for not at all.
        dark: For dark pages.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure, above = new_figure(dark=dark, size=(8.0, 6.5))
    figure.clear()
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes in (above, below):
        axes.patch.set_alpha(0)
        axes.tick_params(colors=ink(dark))
        axes.grid(True, color=ink(dark), alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_color(ink(dark))
            spine.set_visible(side in ("left", "bottom"))

    layers = report.layers
    kinds = list(dict.fromkeys(_kind(layer) for layer in layers))
    for number, kind in enumerate(kinds):
        points = [
            (i, 100 * 10 ** (-layer.snr_db / 20))  # of a lossless layer, whose decibels are infinite, zero
            for i, layer in enumerate(layers)
            if _kind(layer) == kind and layer.snr_db is not None and layer.snr_db > -math.inf
        ]
        if points:
            color = COLORS[number % len(COLORS)]
            marker = "osD^vP"[number // len(COLORS) % 6]
            above.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=0.8, color=color, label=kind)
    above.set_ylabel("error of the weights, %", color=ink(dark))
    above.set_ylim(bottom=0)
    above.set_title(
        f"{format_bytes(report.size_before_bytes)} to {format_bytes(report.size_after_bytes)}, "
        f"{report.bits_per_weight:.2f} bits per weight, {report.method}",
        color=ink(dark),
        loc="left",
        fontsize=11,
    )
    if above.lines:
        above.legend(frameon=False, labelcolor=ink(dark), fontsize=8, ncols=4, loc="upper center")
        above.set_ylim(top=1.35 * above.get_ylim()[1])

    both = [*layers, *report.skipped]
    unit, size = _unit(max(layer.bytes_before for layer in both)) if both else ("MB", 1e6)
    places = range(len(both))
    below.bar(places, [layer.bytes_before / size for layer in both], color=COLORS[5], alpha=0.35, label="before")
    below.bar(places[: len(layers)], [x.bytes_after / size for x in layers], color=COLORS[0], label="now")
    if report.skipped:
        left = [layer.bytes_after / size for layer in report.skipped]
        below.bar(places[len(layers) :], left, color=COLORS[3], label="left as it is")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_ylabel(unit, color=ink(dark))
    below.set_xlabel("layers in the model's order, then those left as they are", color=ink(dark))
    below.legend(frameon=False, labelcolor=ink(dark), fontsize=8)
    return save_figure(figure, path)


def _kind(layer: LayerReport) -> str:
    """The layer's name without the block that it stands in, and without a number."""
    return next((part for part in reversed(layer.path.split(".")) if part and not part.isdecimal()), layer.kind)


def _unit(largest: int) -> tuple[str, float]:
    return next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6)) if largest >= size), ("kB", 1e3))
