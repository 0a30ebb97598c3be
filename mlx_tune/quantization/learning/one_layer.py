"""One layer quantized by itself: by rounding, or by the search, where its outputs bear that out."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.formats.lazy import read_array
from mlx_tune.quantization.formats.scale_search import Effort
from mlx_tune.quantization.learning.apply import (
    LayerOutcome,
    PackedArrays,
    install,
    pack,
    signal_to_noise_db,
    unpacked,
)
from mlx_tune.quantization.learning.input_samples import sampled_output_error
from mlx_tune.quantization.models.dense import dense_twin
from mlx_tune.quantization.planning.overflow import overflows
from mlx_tune.quantization.planning.plan import LayerPlan


def apply_layer(layer: LayerPlan, method: str, effort: Effort) -> LayerOutcome:
    """Quantize one planned layer on its own, by "nearest" or "optimal", and put it in its places.

    Where the plan knows what the layer is given on calibration, the codes of "nearest" are kept if the outputs of those
    of "optimal" are further from the unquantized layer's: the search counts each input by its energy, which leaves out
    how inputs go together.

    Args:
        layer: A layer of a plan, with a format.
        method: "nearest" or "optimal".
        effort: "fast" or "best".

    Returns:
        The loss of the layer.
    """
    assert layer.format is not None
    weight = read_array(dense_twin(layer.module)["weight"])
    packed, used = pack(weight, layer.format, method, effort, layer.energy)
    mx.eval(packed)
    error = optimal_error = note = None
    inputs = layer.inputs() if layer.inputs is not None and used == "optimal" else None
    if inputs is not None:
        plain, _ = pack(weight, layer.format, "nearest")
        error = optimal_error = _output_error(layer, inputs, weight, packed)
        nearest = _output_error(layer, inputs, weight, plain)
        if nearest < error and not overflows(plain, layer.format, weight.dtype):
            note = f"kept 'nearest': the output error of 'optimal' was {error:.3g} against {nearest:.3g}"
            packed, used, error = plain, "nearest", nearest
    snr = signal_to_noise_db(weight, packed, layer.format)
    weighted = None if layer.energy is None else signal_to_noise_db(weight, packed, layer.format, layer.energy)
    del weight
    install(layer, packed)
    return LayerOutcome(layer.path, used, snr, error, optimal_error, note, weighted)


def _output_error(layer: LayerPlan, inputs: mx.array, weight: mx.array, arrays: PackedArrays) -> float:
    assert layer.format is not None
    lookups = isinstance(layer.module, nn.Embedding)
    return sampled_output_error(inputs, weight, unpacked(arrays, layer.format), lookups=lookups)
