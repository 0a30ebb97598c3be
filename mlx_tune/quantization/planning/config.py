"""The `quantization` block of an mlx-lm config.json for a model that is quantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.models.layers import current_format, find_dense_class, is_quantized, takes_mode
from mlx_tune.quantization.models.sites import WalkedModel


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """Describe how a model is quantized, as `mlx_lm.load` reads it.

    With it a model that mlx-lm does not know is loaded again, too: quantize a fresh one with `mlx.nn.quantize`, as
    below, then `load_weights` what `save_weights` has saved.

    Args:
        model: A model, some layers of which are quantized.

    Returns:
        The commonest `group_size`, `bits` and `mode`, and an entry for each layer that differs: its own, or False
        where it could be quantized and is not. Empty if nothing is quantized. mlx-lm wants it under both
        `quantization` and `quantization_config`. An entry is what mlx-lm calls the layer's `to_quantized` with.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).to_quantized())
        >>> quantization_config(model)
        {'group_size': 64, 'bits': 4, 'mode': 'affine', 'layers.0': False}
        >>> config, fresh = quantization_config(model), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> formats = {name: config.pop(name) for name in ("group_size", "bits", "mode")}
        >>> nn.quantize(fresh, **formats, class_predicate=lambda path, m: config.get(path, hasattr(m, "to_quantized")))
        >>> [type(layer).__name__ for layer in fresh.layers]
        ['Linear', 'QuantizedLinear']
    """
    entries: dict[str, dict[str, object] | None] = {}
    packed: Counter[Format] = Counter()
    for site in WalkedModel(model).sites:
        if is_quantized(site.module):
            now = current_format(site.module)
            packed[Format(now.bits, now.group_size, now.mode)] += len(site.paths)
            entries |= dict.fromkeys(site.paths, _entry(site.module, now))
        elif callable(getattr(site.module, "to_quantized", None)):
            entries |= dict.fromkeys(site.paths, None)
    if not packed:
        return {}
    config: dict[str, object] = packed.most_common(1)[0][0].keywords()
    return config | {path: False if e is None else e for path, e in entries.items() if e != config}


def _entry(module: nn.Module, now: Format) -> dict[str, object]:
    entry = now.keywords()
    if isinstance(module.get("global_scale"), mx.array):
        entry["global_scale"] = True
    dense = find_dense_class(type(module))
    to_quantized = getattr(dense, "to_quantized", None)
    if to_quantized is not None and not takes_mode(to_quantized):
        del entry["mode"]  # such as the fused layers of mlx-lm's afm7
    return entry


def quantizes_inputs(model: nn.Module) -> bool:
    """True where layers quantize their inputs too: mlx-lm then wants `"quantize_activations": true` in config.json.

    Examples:
        >>> quantizes_inputs(nn.Sequential(nn.Linear(64, 64).to_quantized()))
        False
    """
    return any(isinstance(site.module, nn.QQLinear) for site in WalkedModel(model).sites)


def keeps_inputs(model: nn.Module) -> list[str]:
    """Paths of packed layers of the kind that can quantize its inputs, and does not.

    Examples:
        >>> keeps_inputs(nn.Sequential(nn.Linear(64, 64).to_quantized()))
        ['layers.0']
    """
    return [site.path for site in WalkedModel(model).sites if isinstance(site.module, nn.QuantizedLinear)]
