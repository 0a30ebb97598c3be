"""Layers that calibration says nothing of: they cost what layers like them do, and get no fewer bits than most."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.planning.plan import LayerPlan
from mlx_tune.quantization.sizing.allocate import allocate
from mlx_tune.units import format_names

#: Bits that a layer counts as which is left alone.
_ALONE_BITS = 16


def sensitivity_like(layer: LayerPlan, layers: list[LayerPlan], seen: Mapping[str, float]) -> float:
    """The sensitivity of layers like one: the median of those with its name, or of all."""

    def name(path: str) -> str:
        return path.rpartition(".")[2]

    known = [x for x in layers if x.path in seen]
    alike = [x for x in known if name(x.path) == name(layer.path) and x.kind == layer.kind] or known
    return statistics.median(seen[x.path] for x in alike) if alike else 1.0


def allocate_with_unmeasured(
    free: list[LayerPlan],
    choices: list[list[Format | None]],
    options: list[list[tuple[int, float]]],
    errors: dict[str, dict[Format, float]],
    budget: int,
    unseen: Mapping[str, str],
    widths: Sequence[int],
) -> list[int] | None:
    """The places of the best formats, none of an unseen layer with fewer bits than most of the others get."""
    best = allocate(options, budget)
    if best is None or not unseen or len(unseen) == len(free):
        return best

    def allowed(i: int, least: int) -> list[int]:
        """Places in a layer's formats that are wide enough, or lose nothing."""
        found = errors[free[i].path]
        wide = [k for k, f in enumerate(choices[i]) if f is None or f.bits >= least or found[f] == 0]
        return wide if free[i].path in unseen else list(range(len(choices[i])))

    for least in widths:
        places = [allowed(i, least) for i in range(len(free))]
        picked = allocate([[options[i][k] for k in some] for i, some in enumerate(places)], budget)
        if picked is None:
            break  # as wide as there is room for
        best = [places[i][k] for i, k in enumerate(picked)]
        chosen = [choices[i][k] for i, k in enumerate(best) if free[i].path not in unseen]
        given = Counter(_ALONE_BITS if f is None else f.bits for f in chosen)
        if max(given, key=lambda bits: (given[bits], bits)) <= least:
            break
    return best


def note_of_unreached(paths: Sequence[str]) -> tuple[str, ...]:
    """A sentence on layers that sensitivities could not be measured of."""
    if not paths:
        return ()
    return (
        f"Calibration says nothing of {format_names(paths)}: the error of their weights counts as much as that of "
        "layers like them, and they get no fewer bits than most layers (see remarks).",
    )
