"""Carrying a plan out by the method that it names: modules with packed arrays in their places, and what was lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.progress import progress_bar
from mlx_tune.quantization.build_report import LayerOutcome
from mlx_tune.quantization.formats.grids import recovers
from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.formats.overflow import overflows
from mlx_tune.quantization.formats.packed_arrays import pack_weight, signal_to_noise_db, unpacked
from mlx_tune.quantization.formats.packing import PackedArrays
from mlx_tune.quantization.learning.dwq import Recompute, train_dwq
from mlx_tune.quantization.learning.gptq_model import CalibratedLayer, gptq_model
from mlx_tune.quantization.learning.input_samples import sampled_output_error
from mlx_tune.quantization.models.answers import Loss
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.layers import dense_twin, is_quantized, quantized_module, read_weight
from mlx_tune.quantization.models.sites import Site
from mlx_tune.quantization.models.transaction import Transaction
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.units import format_names

_log = logging.getLogger(__name__)

#: Puts a module in all places of a site.
Put = Callable[[Site, nn.Module], None]


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
    recovered = recovers(weight, packed, layer.wanted)
    del weight
    install(layer, packed, put)
    return LayerOutcome(layer.path, used, snr, error, optimal_error, note, weighted, recovered)


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
    packed = (now["weight"], now["scales"], now.get("biases"))
    snr, recovered = signal_to_noise_db(weight, packed, layer.wanted), recovers(weight, packed, layer.wanted)
    return LayerOutcome(layer.path, method, snr, output_error, optimal_output_error, note, recovered=recovered)


def calibrated_outcome(layer: LayerPlan, before: nn.Module, found: CalibratedLayer) -> LayerOutcome:
    """The loss of a layer that "gptq" has put into the model, as `outcome_of`."""
    return outcome_of(
        layer,
        before,
        found.method,
        note=found.note,
        output_error=found.output_error,
        optimal_output_error=found.optimal_output_error,
    )


def _output_error(layer: LayerPlan, inputs: mx.array, weight: mx.array, arrays: PackedArrays) -> float:
    lookups = isinstance(layer.module, nn.Embedding)
    return sampled_output_error(inputs, weight, unpacked(arrays, layer.wanted), lookups=lookups)


def carry_out(
    plan: QuantizationPlan,
    transaction: Transaction,
    calibration: list[Batch],
    *,
    blocks: Sequence[tuple[str, nn.Module]],
    recompute: Recompute,
    loss: Loss | None = None,
    progress: bool = False,
) -> tuple[dict[str, LayerOutcome], list[str]]:
    """Quantize every layer of a plan.

    Args:
        plan: The plan.
        transaction: The open one on its model.
        calibration: The batches that "gptq" and "dwq" learn from.
        blocks: The model's blocks.
        recompute: Makes a model recompute the activations of its blocks.
        loss: The loss that "dwq" trains on instead of the distance to the unquantized model.
        progress: Show progress lines.

    Returns:
        The outcome of each layer by its path, and notes for the report.
    """
    if plan.method in ("nearest", "optimal"):
        return _each(plan.layers, plan, transaction, progress), []
    _unpack(plan.layers, transaction)
    learnable = [layer for layer in plan.layers if layer.mode == "affine"]
    others = [layer for layer in plan.layers if layer.mode != "affine"]
    outcomes = _each(others, plan, transaction, progress)
    outcomes |= _gptq(learnable, plan, transaction, calibration, blocks, progress)
    if plan.method == "gptq":
        return outcomes, []
    return _dwq(outcomes, learnable, plan, transaction, calibration, recompute, loss, progress)


def _each(
    layers: Sequence[LayerPlan], plan: QuantizationPlan, transaction: Transaction, progress: bool
) -> dict[str, LayerOutcome]:
    """One layer after another, each by its weights alone."""
    method = "nearest" if plan.method == "nearest" else "optimal"
    outcomes = {}
    if layers:
        with progress_bar("quantizing", len(layers), enabled=progress) as bar:
            for layer in layers:
                bar.update(text=layer.path)
                outcomes[layer.path] = apply_layer(layer, method, plan.effort, transaction.replace)
                bar.advance()
    return outcomes


def _unpack(layers: Sequence[LayerPlan], transaction: Transaction) -> None:
    """Give layers that are quantized anew unquantized modules, which the methods that run the model start from."""
    for site in (site for layer in layers for site in layer.sites):
        if is_quantized(site.module):
            transaction.replace(site, dense_twin(site.module))


def _gptq(
    layers: list[LayerPlan],
    plan: QuantizationPlan,
    transaction: Transaction,
    calibration: list[Batch],
    blocks: Sequence[tuple[str, nn.Module]],
    progress: bool,
) -> dict[str, LayerOutcome]:
    done = gptq_model(
        transaction.model,
        layers,
        calibration,
        install=partial(install, put=transaction.replace),
        blocks=blocks,
        effort=plan.effort,
        progress=progress,
    )
    for found in done:
        if found.note is not None:
            _log.warning("gptq: %s %s", found.path, found.note)
    return {
        layer.path: calibrated_outcome(layer, transaction.original(layer.sites[0]), found)
        for layer, found in zip(layers, done, strict=True)
    }


def _dwq(
    outcomes: dict[str, LayerOutcome],
    layers: list[LayerPlan],
    plan: QuantizationPlan,
    transaction: Transaction,
    calibration: list[Batch],
    recompute: Recompute,
    loss: Loss | None,
    progress: bool,
) -> tuple[dict[str, LayerOutcome], list[str]]:
    reference = None if loss is not None else transaction.reference()
    before = {layer.path: _scales(layer.module) for layer in layers}
    result = train_dwq(transaction.model, reference, calibration, loss=loss, recompute=recompute, progress=progress)
    del reference
    if result.note is not None:
        _log.warning("%s", result.summary)
    trained = [layer for layer in layers if not _same_scales(layer.module, before[layer.path])]
    kept = [layer.path for layer in plan.layers if layer.path not in {x.path for x in trained}]
    for x in trained:
        before_it = transaction.original(x.sites[0])
        outcomes[x.path] = outcome_of(x, before_it, "dwq", note=outcomes[x.path].note)
    return outcomes, [result.summary, *_note_of_kept(kept, outcomes)]


def _scales(module: Any) -> tuple[mx.array, mx.array]:
    return module["scales"], module["biases"]


def _same_scales(module: object, before: tuple[mx.array, mx.array]) -> bool:
    return all(mx.array_equal(a, b).item() for a, b in zip(_scales(module), before, strict=True))


def _note_of_kept(paths: list[str], outcomes: dict[str, LayerOutcome]) -> list[str]:
    """A sentence on the layers that dwq left with the scales of another method."""
    if not paths:
        return []
    by_method: dict[str, list[str]] = {}
    for path in paths:
        by_method.setdefault(outcomes[path].method, []).append(path)
    texts = [f"{method}'s in {format_names(those)}" for method, those in by_method.items()]
    return [f"dwq kept another method's scales in {len(paths)} of {len(outcomes)} layers: {'; '.join(texts)}."]
