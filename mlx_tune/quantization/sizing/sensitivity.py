"""The cost of a layer's error: how wrong each format makes its weights, and how much that moves the model's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.interrupts import interruptible, uninterrupted
from mlx_tune.progress import progress_bar
from mlx_tune.quantization.formats.lazy import read_array
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.formats.scale_search import Effort
from mlx_tune.quantization.judging.accuracy import Accuracy, LanguageAccuracy, LossAccuracy
from mlx_tune.quantization.judging.evaluation import prepare
from mlx_tune.quantization.learning.apply import PackedArrays, pack, quantized_module, signal_to_noise_db
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.dense import dense_twin
from mlx_tune.quantization.models.sites import module_at, put_module
from mlx_tune.quantization.models.stored_outputs import OutputStore
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
    weight = read_array(dense_twin(layer.module)["weight"])
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
    arrays, _ = pack(sample, wanted, method, energy=energy)
    return _relative_error(sample, arrays, wanted, energy)


def measure_divergences(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    probe: Callable[[LayerPlan], Format],
    batches: list[Batch],
    *,
    method: str,
    effort: Effort = "fast",
    progress: bool = False,
) -> dict[str, tuple[float, float]]:
    """Quantize one layer after another, alone, and measure how far the model's answers move.

    Args:
        model: The model; as it was when this returns or fails.
        layers: The layers to measure.
        probe: The format that each is measured in.
        batches: The batches to run the model on.
        method: "nearest", or anything else for "optimal".
        effort: "fast" or "best".
        progress: Show a progress line.

    Returns:
        For each path the divergence, mean KL for token models and else the squared relative error of outputs, and the
        squared relative error of the layer's weights that brought it about.
    """
    comparison = prepare(model, batches, None)
    found = {}
    with OutputStore() as store, progress_bar("measuring sensitivity", len(layers), enabled=progress) as bar:
        comparison.record(model, store, floor=False)
        for layer in layers:
            bar.update(text=layer.path)
            wanted = probe(layer)
            weight = read_array(dense_twin(layer.module)["weight"])
            arrays, _ = pack(weight, wanted, "nearest" if method == "nearest" else "optimal", effort, layer.energy)
            error = _relative_error(weight, arrays, wanted, layer.energy)
            del weight
            with _in_place(model, layer, wanted, arrays):
                moved = divergence_of(comparison.judge(model, store))
            found[layer.path] = (max(0.0, moved), error)
            bar.advance()
    return found


def divergence_of(accuracy: Accuracy) -> float:
    """The one number by which two quantizations of a model are compared; less is better."""
    if isinstance(accuracy, LanguageAccuracy):
        return accuracy.mean_kl
    if isinstance(accuracy, LossAccuracy):
        return accuracy.loss_after
    return accuracy.relative_error**2


def _relative_error(weight: mx.array, arrays: PackedArrays, wanted: Format, energy: mx.array | None) -> float:
    return 10 ** (-signal_to_noise_db(weight, arrays, wanted, energy) / 10)


@contextmanager
def _in_place(model: nn.Module, layer: LayerPlan, wanted: Format, arrays: PackedArrays) -> Iterator[None]:
    """Have one layer quantized for the time of the block."""
    olds = [(path, module_at(model, path)) for path in layer.paths]
    with uninterrupted():
        try:
            for path, old in olds:
                put_module(model, path, quantized_module(old, wanted, arrays))
            with interruptible():
                yield
        finally:
            for path, old in olds:
                put_module(model, path, old)
