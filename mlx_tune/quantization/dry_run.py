"""`plan_quantization`: what `quantize_model` would do, without doing it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.judging.evaluation import Watched
from mlx_tune.quantization.methods import apply_layer
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.checks import note_of_range
from mlx_tune.quantization.planning.faulty_kernels import fault_finder, keep_unpacked
from mlx_tune.quantization.planning.known_grids import note_of_grids
from mlx_tune.quantization.planning.layout import lay_out
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan
from mlx_tune.quantization.planning.request import Request
from mlx_tune.quantization.planning.shape_check import rehearse
from mlx_tune.quantization.sizing.target import allocate_to_target
from mlx_tune.state import same_random_stream


def plan_quantization(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 64,
    *,
    method: str = "optimal",
    mode: str = "affine",
    effort: Effort = "fast",
    overrides: Mapping[str, bool | Mapping[str, object]] | None = None,
    skip: Iterable[str] | str | None = None,
    target_bpw: float | None = None,
    target_bytes: int | str | None = None,
    activations: bool = False,
    requantize: bool = False,
    scale_dtype: mx.Dtype | str | None = None,
    verify_kernels: bool = True,
    calibration: Iterable[object] | None = None,
    evaluation: Iterable[object] | None = None,
    progress: bool = True,
) -> QuantizationPlan:
    """Work out what `quantize_model` would do, without touching the model.

    A few rows of a few layers are read, to see whether the weights lie on a grid of at most 4 bits already, as weights
    do that were packed before: a note then names the format that holds them without loss. With `target_bpw` or
    `target_bytes` all weights are read and candidates tried, since the choice of bits rests on their error; the model
    is then as it was.

    Args:
        model: Any model; see `quantize_model` for all arguments.
        bits: Bits of a code.
        group_size: Weights that share a scale.
        method: "nearest", "optimal", "gptq" or "dwq".
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        effort: "fast" or "best".
        overrides: Pattern to what matching layers get instead.
        skip: Patterns of layers to leave alone.
        target_bpw: Bits per weight that the model must not exceed.
        target_bytes: Bytes that the model must not exceed.
        activations: True where layers quantize their inputs too.
        requantize: True where layers that are quantized already are quantized anew.
        scale_dtype: Of affine scales and biases, instead of that of the weights.
        verify_kernels: Multiply with each distinct kind of packed weights once, and leave layers unpacked that MLX
            computes wrong on this device.
        calibration: Batches to measure layers' sensitivity on, where a target is given.
        evaluation: Batches to check such a choice on, where there is no calibration.
        progress: Show progress lines, where a target is given.

    Returns:
        The plan; `print` it.

    Raises:
        QuantizationError: The same as `quantize_model` raises before it changes anything.
        BackendError: MLX computes every layer wrong in the formats that were asked for.

    Examples:
        >>> plan = plan_quantization(nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 80)), 4, 64)
        >>> {layer.path: (layer.bits, layer.bytes_after) for layer in plan.layers}
        {'layers.0': (4, 5376), 'layers.2': (4, 3520)}
    """
    request = Request(
        bits, group_size, method, mode, effort, overrides, skip, target_bpw, target_bytes, activations, requantize,
        scale_dtype,
    )  # fmt: skip
    walked = WalkedModel(model)
    plan = lay_out(walked, request)
    fault_of = None
    if verify_kernels:
        fault_of = fault_finder(walked)
        # Whether inputs can be quantized here quantize_model finds out, and refuses; a plan for it can still be read.
        plan = keep_unpacked(
            plan, fault_of, among=lambda layer: (layer.fixed or not request.targeted) and not _both(layer)
        )
    plan = replace(plan, notes=(*plan.notes, *note_of_grids(plan)))
    if not request.targeted:
        plan = replace(plan, notes=(*plan.notes, *note_of_range(plan)))
        if calibration is None and evaluation is None:
            return plan
    with same_random_stream():
        learn, judge = rehearse(
            walked, plan, read_batches(calibration, "calibration"), read_batches(evaluation, "evaluation")
        )
        if not request.targeted:
            return plan
        return allocate_to_target(
            walked,
            plan,
            request,
            watch=Watched,
            apply=apply_layer,
            calibration=learn,
            evaluation=judge,
            blocks=blocks_of(model),
            progress=progress,
            fault_of=fault_of,
        )


def _both(layer: LayerPlan) -> bool:
    return layer.format is not None and layer.format.quantize_input
