"""The `quantization` block of an mlx-lm config.json for a model that is quantized."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.nn as nn

from mlx_tune.quantization.modes import Format
from mlx_tune.quantization.sites import current_format, is_quantized, walk


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """Describe how a model is quantized, as `mlx_lm.load` reads it.

    Args:
        model: A model, some layers of which are quantized.

    Returns:
        The commonest `group_size`, `bits` and `mode`, and an entry for each layer that differs: its own three, or
        False where it could be quantized and is not. Empty if nothing is quantized. mlx-lm wants it under both
        `quantization` and `quantization_config`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).to_quantized())
        >>> quantization_config(model)
        {'group_size': 64, 'bits': 4, 'mode': 'affine', 'layers.0': False}
    """
    formats: dict[str, Format | None] = {}
    for site in walk(model):
        for path in site.paths:
            if is_quantized(site.module):
                now = current_format(site.module)
                formats[path] = Format(now.bits, now.group_size, now.mode)
            elif callable(getattr(site.module, "to_quantized", None)):
                formats[path] = None
    packed = Counter(f for f in formats.values() if f is not None)
    if not packed:
        return {}
    common = packed.most_common(1)[0][0]
    config: dict[str, Any] = common.parts()
    for path, found in formats.items():
        if found != common:
            config[path] = False if found is None else found.parts()
    return config


def quantizes_inputs(model: nn.Module) -> bool:
    """Whether layers quantize their inputs too: mlx-lm then wants `"quantize_activations": true` in config.json.

    Examples:
        >>> quantizes_inputs(nn.Sequential(nn.Linear(64, 64).to_quantized()))
        False
    """
    return any(isinstance(site.module, nn.QQLinear) for site in walk(model))
