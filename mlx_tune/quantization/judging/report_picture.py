"""A quantization report as a picture: error against depth above, bytes by layer below."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlx_tune.presentation.plotting import COLORS, ink, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class DrawnLayer(NamedTuple):
    """One layer of the picture.

    Attributes:
        kind: Its name without the block that it stands in.
        error_percent: Root mean square of its weights' error over that of the weights; None where it has none.
        bytes_before: Bytes of its arrays before.
        bytes_after: Bytes of its arrays now.
    """

    kind: str
    error_percent: float | None
    bytes_before: int
    bytes_after: int


def draw_layers(
    title: str,
    layers: Sequence[DrawnLayer],
    left: Sequence[DrawnLayer],
    path: str | os.PathLike[str] | None = None,
    *,
    dark: bool = False,
) -> Figure:
    """Draw every layer's relative error against its place in the model, one colour for each kind, and its bytes.

    Args:
        title: The line above the picture.
        layers: The quantized ones, in the model's order.
        left: Those left as they are.
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

    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    for number, kind in enumerate(kinds):
        points = [
            (i, layer.error_percent)
            for i, layer in enumerate(layers)
            if layer.kind == kind and layer.error_percent is not None
        ]
        if points:
            color = COLORS[number % len(COLORS)]
            marker = "osD^vP"[number // len(COLORS) % 6]
            above.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=0.8, color=color, label=kind)
    above.set_ylabel("error of the weights, %", color=ink(dark))
    above.set_ylim(bottom=0)
    above.set_title(title, color=ink(dark), loc="left", fontsize=11)
    if above.lines:
        above.legend(frameon=False, labelcolor=ink(dark), fontsize=8, ncols=4, loc="upper center")
        above.set_ylim(top=1.35 * above.get_ylim()[1])

    both = [*layers, *left]
    unit, size = _unit(max(layer.bytes_before for layer in both)) if both else ("MB", 1e6)
    places = range(len(both))
    below.bar(places, [layer.bytes_before / size for layer in both], color=COLORS[5], alpha=0.35, label="before")
    below.bar(places[: len(layers)], [x.bytes_after / size for x in layers], color=COLORS[0], label="now")
    if left:
        kept = [layer.bytes_after / size for layer in left]
        below.bar(places[len(layers) :], kept, color=COLORS[3], label="left as it is")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_ylabel(unit, color=ink(dark))
    below.set_xlabel("layers in the model's order, then those left as they are", color=ink(dark))
    below.legend(frameon=False, labelcolor=ink(dark), fontsize=8)
    return save_figure(figure, path)


def _unit(largest: int) -> tuple[str, float]:
    return next(((name, size) for name, size in (("GB", 1e9), ("MB", 1e6)) if largest >= size), ("kB", 1e3))
