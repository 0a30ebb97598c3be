"""Carrying a plan out: packed arrays into modules, modules into the model, and what each layer lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.formats.overflow import overflows
from mlx_tune.quantization.formats.packed_arrays import pack_weight, signal_to_noise_db, unpacked
from mlx_tune.quantization.formats.packing import PackedArrays
from mlx_tune.quantization.learning.input_samples import sampled_output_error
from mlx_tune.quantization.models.layers import quantized_module, read_weight
from mlx_tune.quantization.models.sites import Site
from mlx_tune.quantization.planning.plan import LayerPlan

#: Puts a module in all places of a site.
Put = Callable[[Site, nn.Module], None]


@dataclass(frozen=True)
class LayerOutcome:
    """The outcome of a layer.

    Attributes:
        path: Where it stands first.
        method: The method by which its codes were found: "nearest", "optimal", "gptq" or "dwq".
        snr_db: Power of the weights over the power of their error, in decibels; infinite where nothing was lost.
        output_error: Squared error of its outputs over their squares, measured on calibration; None if it was not.
        optimal_output_error: The same had it been quantized by "optimal".
        note: Further remarks, such as a fallback with its reason.
        input_snr_db: As `snr_db`, each input counted by its energy; None where that is not known.
    """

    path: str
    method: str
    snr_db: float
    output_error: float | None = None
    optimal_output_error: float | None = None
    note: str | None = None
    input_snr_db: float | None = None


def install(layer: LayerPlan, arrays: PackedArrays, put: Put = Site.put) -> None:
    """Put packed arrays in every place of a planned layer: tied modules share them.

    Args:
        layer: A layer of a plan, with a format.
        arrays: Its packed weights, scales and biases.
        put: Puts a module in the places of a site, such as `Transaction.replace`, which can be undone.
    """
    for site in layer.sites:
        put(site, quantized_module(site.module, layer.wanted, arrays))


def apply_layer(layer: LayerPlan, method: str, effort: Effort, put: Put = Site.put) -> LayerOutcome:
    """Quantize one planned layer on its own, by "nearest" or "optimal", and put it in its places.

    Where the plan knows what the layer is given on calibration, the codes of "nearest" are kept if the outputs of those
    of "optimal" are further from the unquantized layer's: the search counts each input by its energy, which leaves out
    how inputs go together.

    Args:
        layer: A layer of a plan, with a format.
        method: "nearest" or "optimal".
        effort: "fast" or "best".
        put: As for `install`.

    Returns:
        The loss of the layer.
    """
    weight = read_weight(layer.module)
    packed, used = pack_weight(weight, layer.wanted, method, effort, layer.energy)
    mx.eval(packed)
    error = optimal_error = note = None
    inputs = layer.inputs() if layer.inputs is not None and used == "optimal" else None
    if inputs is not None:
        plain, _ = pack_weight(weight, layer.wanted, "nearest")
        error = optimal_error = _output_error(layer, inputs, weight, packed)
        nearest = _output_error(layer, inputs, weight, plain)
        if nearest < error and not overflows(plain, layer.wanted, weight.dtype):
            note = f"kept 'nearest': the output error of 'optimal' was {error:.3g} against {nearest:.3g}"
            packed, used, error = plain, "nearest", nearest
    snr = signal_to_noise_db(weight, packed, layer.wanted)
    weighted = None if layer.energy is None else signal_to_noise_db(weight, packed, layer.wanted, layer.energy)
    del weight
    install(layer, packed, put)
    return LayerOutcome(layer.path, used, snr, error, optimal_error, note, weighted)


def outcome_of(
    layer: LayerPlan,
    before: nn.Module,
    method: str,
    *,
    note: str | None = None,
    output_error: float | None = None,
    optimal_output_error: float | None = None,
) -> LayerOutcome:
    """The loss of a layer that is in the model already.

    Args:
        layer: A planned layer, quantized by now.
        before: The module that stood there before.
        method: The method that was used.
        note: Further remarks.
        output_error: As in `LayerOutcome`.
        optimal_output_error: As in `LayerOutcome`.
    """
    now = layer.module
    weight = read_weight(before)
    snr = signal_to_noise_db(weight, (now["weight"], now["scales"], now.get("biases")), layer.wanted)
    return LayerOutcome(layer.path, method, snr, output_error, optimal_output_error, note)


def _output_error(layer: LayerPlan, inputs: mx.array, weight: mx.array, arrays: PackedArrays) -> float:
    lookups = isinstance(layer.module, nn.Embedding)
    return sampled_output_error(inputs, weight, unpacked(arrays, layer.wanted), lookups=lookups)
