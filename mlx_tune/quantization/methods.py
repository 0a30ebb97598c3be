"""Carrying a plan out by the method that it names."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx

from mlx_tune.progress import progress_bar
from mlx_tune.quantization.learning.apply_layer import LayerOutcome, apply_layer, install, outcome_of
from mlx_tune.quantization.learning.dwq import Recompute, train_dwq
from mlx_tune.quantization.learning.gptq_model import gptq_model
from mlx_tune.quantization.models.answers import Loss
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.interception import FindBlocks
from mlx_tune.quantization.models.layers import dense_twin, is_quantized
from mlx_tune.quantization.models.sites import module_at
from mlx_tune.quantization.models.transaction import Transaction, swap_module
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.units import format_names

_log = logging.getLogger(__name__)


def carry_out(
    plan: QuantizationPlan,
    transaction: Transaction,
    calibration: list[Batch],
    *,
    blocks_of: FindBlocks,
    recompute: Recompute,
    loss: Loss | None = None,
    progress: bool = False,
) -> tuple[dict[str, LayerOutcome], list[str]]:
    """Quantize every layer of a plan.

    Args:
        plan: The plan.
        transaction: The open one on its model.
        calibration: The batches that "gptq" and "dwq" learn from.
        blocks_of: Finds the blocks of a model.
        recompute: Makes a model recompute the activations of its blocks.
        loss: The loss that "dwq" trains on instead of the distance to the unquantized model.
        progress: Show progress lines.

    Returns:
        The outcome of each layer by its path, and notes for the report.
    """
    if plan.method in ("nearest", "optimal"):
        return _each(plan.layers, plan, progress), []
    _unpack(plan.layers)
    learnable = [layer for layer in plan.layers if layer.mode == "affine"]
    others = [layer for layer in plan.layers if layer.mode != "affine"]
    outcomes = _each(others, plan, progress)
    outcomes |= _gptq(learnable, plan, calibration, blocks_of, progress)
    if plan.method == "gptq":
        return outcomes, []
    return _dwq(outcomes, learnable, plan, transaction, calibration, recompute, loss, progress)


def _each(layers: list[LayerPlan] | tuple[LayerPlan, ...], plan: QuantizationPlan, progress: bool) -> dict[str, Any]:
    """One layer after another, each by its weights alone."""
    method = "nearest" if plan.method == "nearest" else "optimal"
    outcomes = {}
    if layers:
        with progress_bar("quantizing", len(layers), enabled=progress) as bar:
            for layer in layers:
                bar.update(text=layer.path)
                outcomes[layer.path] = apply_layer(layer, method, plan.effort)
                bar.advance()
    return outcomes


def _unpack(layers: tuple[LayerPlan, ...]) -> None:
    """Give layers that are quantized anew unquantized modules, which the methods that run the model start from."""
    for layer in layers:
        twins: dict[int, Any] = {}
        for path in layer.paths:
            module = module_at(layer.model, path)
            if is_quantized(module):
                twin = twins.setdefault(id(module), dense_twin(module))
                swap_module(layer.model, path, twin)


def _gptq(
    layers: list[LayerPlan], plan: QuantizationPlan, calibration: list[Batch], blocks_of: FindBlocks, progress: bool
) -> dict[str, LayerOutcome]:
    done = gptq_model(
        plan.layers[0].model,
        layers,
        calibration,
        install=install,
        blocks_of=blocks_of,
        effort=plan.effort,
        progress=progress,
    )
    for found in done:
        if found.note is not None:
            _log.warning("gptq: %s %s", found.path, found.note)
    return {
        layer.path: outcome_of(
            layer,
            found.method,
            note=found.note,
            output_error=found.output_error,
            optimal_output_error=found.optimal_output_error,
        )
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
    model = plan.layers[0].model
    reference = None if loss is not None else transaction.reference()
    before = {layer.path: _scales(layer.module) for layer in layers}
    result = train_dwq(model, reference, calibration, loss=loss, recompute=recompute, progress=progress)
    del reference
    if result.note is not None:
        _log.warning("%s", result.summary)
    trained = [layer for layer in layers if not _same_scales(layer.module, before[layer.path])]
    kept = [layer.path for layer in plan.layers if layer.path not in {x.path for x in trained}]
    outcomes = {**outcomes, **{x.path: outcome_of(x, "dwq", note=outcomes[x.path].note) for x in trained}}
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
