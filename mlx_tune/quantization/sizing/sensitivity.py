"""The cost of a layer's error: how wrong each format makes its weights, and how much that moves the model's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_tune.progress import progress_bar
from mlx_tune.quantization.formats.modes import Effort, Format
from mlx_tune.quantization.formats.packed_arrays import pack_weight, signal_to_noise_db
from mlx_tune.quantization.formats.packing import PackedArrays
from mlx_tune.quantization.models.layers import quantized_module, read_weight
from mlx_tune.quantization.models.sites import in_places
from mlx_tune.quantization.planning.plan import LayerPlan

#: Weights of a layer that are looked at to learn how wrong a format makes them: over a thousand groups.
_SAMPLE_WEIGHTS = 1 << 16


def weight_errors(layer: LayerPlan, formats: Sequence[Format], method: str) -> dict[Format, float]:
    """Squared error over squared weights, for each format, on an even sample of a layer's rows.

    Where the energy of the layer's inputs is known, squares count in proportion to it.

    Args:
        layer: A layer of a plan.
        formats: Formats to try.
        method: "nearest", or anything else for "optimal".
    """
    weight = read_weight(layer.module)
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, rows.shape[0] * rows.shape[1] // _SAMPLE_WEIGHTS)
    sample = mx.contiguous(rows[::step])
    nearest = {wanted: _sample_error(sample, wanted, "nearest", layer.energy) for wanted in formats}
    if method == "nearest":
        return nearest
    # The search is tried for one group size of each width; what it gains hardly depends on it.
    gains: dict[tuple[int, str], float] = {}
    for wanted in formats:
        if (wanted.bits, wanted.mode) not in gains and nearest[wanted] > 0:
            gains[wanted.bits, wanted.mode] = _sample_error(sample, wanted, "optimal", layer.energy) / nearest[wanted]
    return {f: nearest[f] * gains.get((f.bits, f.mode), 1.0) for f in formats}


def _sample_error(sample: mx.array, wanted: Format, method: str, energy: mx.array | None) -> float:
    arrays, _ = pack_weight(sample, wanted, method, energy=energy)
    return _relative_error(sample, arrays, wanted, energy)


def measure_divergences(
    layers: Sequence[LayerPlan],
    probe: Callable[[LayerPlan], Format],
    divergence: Callable[[LayerPlan], float],
    *,
    method: str,
    effort: Effort = "fast",
    progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """Quantize one layer after another, alone, and measure how far the model's answers move.

    Args:
        layers: The layers to measure, of one model; it is as it was when this returns or fails.
        probe: The format that each is measured in.
        divergence: Tells how far the model's answers have moved by a change of one layer.
        method: "nearest", or anything else for "optimal".
        effort: "fast" or "best".
        progress: Show a progress line.

    Returns:
        For each path the divergence, mean KL for token models and else the squared relative error of outputs, and the
        squared relative error of the layer's weights that brought it about.
    """
    found: dict[str, tuple[float, float]] = {}
    with progress_bar("measuring sensitivity", len(layers), enabled=progress) as bar:
        for layer in layers:
            bar.update(text=layer.path)
            wanted = probe(layer)
            weight = read_weight(layer.module)
            arrays, _ = pack_weight(
                weight, wanted, "nearest" if method == "nearest" else "optimal", effort, layer.energy
            )
            error = _relative_error(weight, arrays, wanted, layer.energy)
            del weight
            with in_places((site, quantized_module(site.module, wanted, arrays)) for site in layer.sites):
                moved = divergence(layer)
            found[layer.path] = (max(0.0, moved), error)
            bar.advance()
    return found


def _relative_error(weight: mx.array, arrays: PackedArrays, wanted: Format, energy: mx.array | None) -> float:
    return 10 ** (-signal_to_noise_db(weight, arrays, wanted, energy) / 10)
