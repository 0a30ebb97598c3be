"""A plan's remark on weights that lie on a grid already: the format that loses nothing."""

from __future__ import annotations

from collections import Counter

from mlx_tune.quantization.formats.grids import grid_of
from mlx_tune.quantization.formats.lazy_arrays import read_array
from mlx_tune.quantization.models.layers import is_quantized
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.units import format_count, format_names
from mlx_tune.upstream import is_lazy

#: Layers that are looked at, spread over the model; fewer where each has to be read from disk as a whole.
_LAYERS, _LAYERS_ON_DISK = 8, 3


def note_of_grids(plan: QuantizationPlan) -> tuple[str, ...]:
    """A sentence on layers whose weights lie on a grid, and on the format that holds them; none where there are none.

    Args:
        plan: A plan. A few rows of a few of its layers are read.
    """
    layers = [layer for layer in plan.layers if not is_quantized(layer.module)]
    on_disk = any(is_lazy(layer.module["weight"]) for layer in layers)
    some = _spread(layers, _LAYERS_ON_DISK if on_disk else _LAYERS)
    grids = {layer.path: grid_of(read_array(layer.module["weight"])) for layer in some}
    found = Counter(grid for grid in grids.values() if grid is not None)
    if not found:
        return ()
    grid, count = found.most_common(1)[0]
    lossless = all(x.format == grid for x in some if grids[x.path] == grid)
    others = [path for path, own in grids.items() if own != grid]
    rest = f" Not so {format_names(others, most=3)}." if others else ""
    asked = "as this plan has it" if lossless else "which this plan does not have"
    return (
        f"The weights lie on a grid already, in {count} of {format_count(len(some), 'layer')} that were looked at: "
        f"{grid}, {asked}, holds them without loss by method='optimal'.{rest}",
    )


def _spread(layers: list[LayerPlan], most: int) -> list[LayerPlan]:
    """At most so many of the layers, from the first to the last."""
    count = min(most, len(layers))
    return [layers[i * (len(layers) - 1) // max(1, count - 1)] for i in range(count)]
