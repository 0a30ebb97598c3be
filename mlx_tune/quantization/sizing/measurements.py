"""Measurements of a model's layers, kept for when another size is wanted of the same weights and calibration."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_tune.quantization.formats.lazy_arrays import read_array
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.sites import Site, own_arrays
from mlx_tune.quantization.planning.plan import QuantizationPlan
from mlx_tune.upstream import TRAINING

#: Models whose measurements are kept, the latest ones: some numbers for each layer.
_MODELS = 4

#: Bits between the format that a sensitivity was measured in and the one that it counts for as well.
_NEAR_BITS = 1


@dataclass
class Measurements:
    """The measurements of one model on one calibration; they hold none of its arrays.

    Attributes:
        errors: The relative squared error of each layer in each format, by path.
        divergences: By path and format, how far the model's answers moved by one layer in it, and that layer's error.
    """

    errors: dict[str, dict[Format, float]] = field(default_factory=dict)
    divergences: dict[tuple[str, Format], tuple[float, float]] = field(default_factory=dict)

    def near(self, path: str, wanted: Format) -> tuple[float, float] | None:
        """A layer's figures in a format, or in one that has a bit more or less; None where there are none.

        Args:
            path: Of the layer.
            wanted: The format.
        """
        known = [f for layer, f in self.divergences if layer == path and f.mode == wanted.mode]
        off = {f: (abs(f.bits - wanted.bits), abs(f.group_size - wanted.group_size)) for f in known}
        found = min(off, key=lambda f: off[f], default=None)
        if found is None or abs(found.bits - wanted.bits) > _NEAR_BITS:
            return None
        return self.divergences[path, found]


_kept: OrderedDict[str, Measurements] = OrderedDict()


def measurements_of(sites: Sequence[Site], plan: QuantizationPlan, calibration: Sequence[Batch]) -> Measurements:
    """The measurements that this process has of a model already; all that is found out later belongs in them.

    Every bit of its arrays and of the calibration counts, and the plain numbers and texts of its modules. The smallest
    change makes it another model.

    Args:
        sites: The modules of the model.
        plan: Its plan: by which method and effort layers are packed, and whether the energies of inputs are known.
        calibration: All batches.

    Examples:
        >>> import mlx.nn as nn
        >>> import mlx_tune as mt
        >>> from mlx_tune.quantization.models.sites import WalkedModel
        >>> net = nn.Sequential(nn.Linear(64, 64))
        >>> sites, plan = WalkedModel(net).sites, mt.plan_quantization(net, 4, 64)
        >>> first, again = measurements_of(sites, plan, []), measurements_of(sites, plan, [])
        >>> net.layers[0].weight += 1e-6
        >>> first is again, measurements_of(sites, plan, []) is first
        (True, False)
    """
    key = _digest(sites, plan, calibration)
    found = _kept.pop(key, None) or Measurements()
    _kept[key] = found
    while len(_kept) > _MODELS:
        _kept.popitem(last=False)
    return found


def _digest(sites: Sequence[Site], plan: QuantizationPlan, calibration: Sequence[Batch]) -> str:
    digest = hashlib.blake2b()

    def note(*values: object) -> None:
        digest.update(repr(values).encode())

    method = "nearest" if plan.method == "nearest" else "optimal"
    note(method, plan.effort, plan.scale_dtype)
    for layer in (*plan.layers, *plan.skipped):
        note(layer.path, layer.energy is None)
    seen: dict[int, int] = {}
    for site in sites:
        module = site.module
        note(site.paths, type(module).__qualname__, _plain(vars(module)), _plain(module))
        for name, array in own_arrays(module).items():
            note(name, array.shape, str(array.dtype), seen.setdefault(id(array), len(seen)))
            if seen[id(array)] == len(seen) - 1:
                digest.update(_bytes_of(array))
    for batch in calibration:
        note(_plain(batch.keywords), [a for a in batch.arguments if isinstance(a, (int, float, str))])
        for array in batch.arrays:
            note(array.shape, str(array.dtype))
            digest.update(_bytes_of(array))
    return digest.hexdigest()


def _plain(items: object) -> list[tuple[str, object]]:
    """The numbers and texts of a dictionary, but for the mode: all are measured in evaluation mode."""
    assert hasattr(items, "items")
    return sorted((str(k), v) for k, v in items.items() if isinstance(v, (bool, int, float, str)) and k != TRAINING)


def _bytes_of(array: mx.array) -> memoryview:
    flat: Any = mx.contiguous(read_array(array)).reshape(-1)
    return memoryview(flat.view(mx.uint8) if flat.size else b"")
