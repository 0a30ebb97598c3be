"""`quantize_model`: plan, check, measure, replace, measure again, report; or leave everything as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.blocks import blocks_of, checkpoint_blocks
from mlx_tune.errors import QuantizationError
from mlx_tune.memory import track_memory
from mlx_tune.quantization.build_report import report_of
from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.judging.compare_layers import compare_layers
from mlx_tune.quantization.judging.evaluation import Watched, prepare_evaluation
from mlx_tune.quantization.judging.nearest_guard import Guard, part_of, watched
from mlx_tune.quantization.judging.report import QuantizationReport
from mlx_tune.quantization.judging.statistics import overlap
from mlx_tune.quantization.judging.timed_runs import measure_after, measure_before
from mlx_tune.quantization.learning.importance import few_of, with_energies
from mlx_tune.quantization.learning.input_samples import InputSamples
from mlx_tune.quantization.methods import apply_layer, carry_out
from mlx_tune.quantization.models.answers import Loss
from mlx_tune.quantization.models.batches import Batch, count_tokens, read_batches, token_rows
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.models.stored_outputs import OutputStore
from mlx_tune.quantization.models.transaction import Transaction
from mlx_tune.quantization.planning.checks import check_backend, check_finite, check_overflow
from mlx_tune.quantization.planning.faulty_kernels import fault_finder, keep_unpacked
from mlx_tune.quantization.planning.layout import lay_out
from mlx_tune.quantization.planning.request import Request
from mlx_tune.quantization.planning.shape_check import rehearse, resolve
from mlx_tune.quantization.sizing.target import allocate_to_target
from mlx_tune.state import same_random_stream
from mlx_tune.units import format_percent

T = TypeVar("T")

#: Share of the evaluation's windows found in the calibration from which on a report warns: code and prose repeat
#: licences and boilerplate, so that a little of it is nobody's fault.
_OVERLAP = 0.05


def quantize_model(
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
    loss: Loss | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize a model in place, and report what that cost.

    Every layer that has a quantized form and whose rows divide by the group size is replaced; all others are in the
    report with their reasons. Peak memory is at most the model and what its largest block takes to work on, besides
    what a method that learns holds of its calibration: replaced weights wait on disk until the call has succeeded. If
    anything fails, the model is what it was.

    Args:
        model: Any model.
        bits: Bits of a code: 1, 2, 3, 4, 5, 6 or 8 in mode "affine".
        group_size: Weights of a row that share a scale: 32, 64 or 128 in mode "affine".
        method: "nearest" is `mx.quantize`; "optimal" searches for the least squared error of each group, each input
            counted by its energy, which running the model on 256 random tokens tells, or on `calibration`, and then
            keeps "nearest" in layers whose outputs it would make worse; "gptq" and "dwq" need `calibration`.
        mode: "affine", or "mxfp4", "mxfp8", "nvfp4", which fix bits and group size.
        effort: "fast", or "best" for a longer search.
        overrides: Pattern to what matching layers get instead: a dict of bits, group_size and mode, False for being
            left alone, True for the format of the rest even where the model protects the layer. Of several patterns
            that match, the last counts.
        skip: Patterns of layers to leave alone.
        target_bpw: Choose bits and group sizes layer by layer, so that the whole model has at most this many bits
            per weight (`bits` and `group_size` then say what is compared with).
        target_bytes: The same in bytes of all parameters, a number or text such as "4GB".
        activations: Let layers quantize their inputs too, in modes "nvfp4" and "mxfp8", where the backend can.
        requantize: Quantize layers anew that are quantized already.
        scale_dtype: Of scales and biases in mode "affine", such as `mx.bfloat16` or "bfloat16"; that of the weights by
            default, which for a float32 model means 64 bits for each group.
        verify_kernels: Multiply with each distinct kind of packed weights once before, and leave a layer unpacked, or
            give it another format where a size is to be met, if MLX computes it wrong on this device or cannot. False
            is for models that will run on another machine.
        calibration: Batches to learn from, as in `evaluation`, and other ones.
        evaluation: Batches to judge on: token arrays [batch, length], which are shifted here, or whatever the model
            is called with, a tuple being several arguments and a dictionary arguments by name.
        loss: `loss(model, *batch)`, or `loss(model, **batch)`, a number, for models that do not predict tokens.
        progress: Show progress lines.

    Returns:
        Sizes, every layer's bits and error, every skipped layer's reason, and, with `evaluation`, accuracy and speed.

    Raises:
        QuantizationError: An argument or a layer stands in the way; nothing was changed.
        BackendError: MLX cannot do the mode on this backend, or computes every layer wrong in it.
        DiskError: Too little free disk for what the evaluation compares with.

    Examples:
        >>> import mlx.core as mx
        >>> model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> report = quantize_model(model, 8, 64, evaluation=[mx.random.normal((4, 128))], progress=False)
        >>> [(layer.path, layer.bits) for layer in report.layers], report.accuracy.relative_error < 0.01
        ([('layers.0', 8), ('layers.2', 8)], True)
    """
    request = Request(
        bits, group_size, method, mode, effort, overrides, skip, target_bpw, target_bytes, activations, requantize,
        scale_dtype,
    )  # fmt: skip
    walked = WalkedModel(model)
    plan = lay_out(walked, request)
    learn, judge = read_batches(calibration, "calibration"), read_batches(evaluation, "evaluation")
    if method in ("gptq", "dwq") and not learn:
        raise QuantizationError(
            f"method={method!r} learns from text or other inputs: pass calibration=[batches]. "
            "Without any, use method='optimal'."
        )
    if loss is not None and not callable(loss):
        raise QuantizationError(f"loss={loss!r} must be a function loss(model, *batch).")
    if loss is not None and not judge and method != "dwq":
        raise QuantizationError("loss=... is what the evaluation is judged by: pass evaluation=[batches] as well.")
    warnings = _overlap_warning(judge, learn)
    check_backend(plan)
    fault_of = fault_finder(walked) if verify_kernels else None
    if fault_of is not None:
        plan = keep_unpacked(plan, fault_of, among=lambda layer: layer.fixed or not request.targeted, progress=progress)
    with ExitStack() as stack:
        stack.enter_context(same_random_stream())
        learn, judge = rehearse(walked, plan, learn, judge, loss)
        largest = check_finite(plan)
        notes, blocks = list[str](), blocks_of(model)
        if method == "optimal" or (method != "nearest" and request.targeted):
            samples = None
            if method == "optimal" and learn:
                samples = stack.enter_context(InputSamples(len(few_of(learn))))
            plan, unknown = with_energies(walked, plan, learn, samples, blocks=blocks)
            notes += unknown
        if request.targeted:
            plan = allocate_to_target(
                walked,
                plan,
                request,
                watch=Watched,
                apply=apply_layer,
                calibration=learn,
                evaluation=judge,
                blocks=blocks,
                progress=progress,
                fault_of=fault_of,
            )
        check_overflow(plan, largest)
        store = stack.enter_context(OutputStore())
        comparison, before = None, None
        if learn and method == "nearest" and not request.targeted:
            notes.append("The calibration was not used: method='nearest' looks at the weights alone.")
        if judge:
            comparison = prepare_evaluation(walked, judge, loss, warnings=warnings)
            comparison.record(walked, store, progress=progress)
            timed, in_tokens = comparison.parts[0], comparison.kind == "tokens"
            before = _measured(partial(measure_before, walked, timed, tokens_in=in_tokens, loss=loss), notes)
        watch = guard = None
        if judge and watched(plan):
            watch = Watched(walked, part_of(judge), loss)
            guard = Guard(plan, stack.enter_context(watch))
        transaction = stack.enter_context(Transaction(walked))
        with track_memory() as memory:
            outcomes, remarks = carry_out(
                plan,
                transaction,
                learn,
                blocks=blocks,
                recompute=checkpoint_blocks,
                loss=loss,
                progress=progress,
            )
        accuracy = speed = None
        warning = None
        if watch is not None and guard is not None:
            warning = guard.verdict(watch.evaluation.kind, count_tokens(watch.evaluation.parts))
        if comparison is not None:
            accuracy = comparison.judge(walked, store, progress=progress)
            timed = comparison.parts[0]
            speed = _measured(partial(measure_after, walked, timed, before, loss=loss), notes) if before else None
        report = report_of(plan, outcomes, memory, accuracy, speed, (*remarks, *transaction.notes, *notes))
        return replace(report, warning=warning)


def quantization_report(
    model: nn.Module,
    reference: nn.Module,
    evaluation: Iterable[object],
    *,
    calibration: Iterable[object] | None = None,
    loss: Loss | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Compare any two models of one architecture, one of them quantized by whatever means.

    Args:
        model: The quantized one.
        reference: The one to measure against.
        evaluation: As for `quantize_model`.
        calibration: The batches that the quantized one learned from, for a warning where both overlap.
        loss: As for `quantize_model`.
        progress: Show progress lines.

    Returns:
        A report like that of `quantize_model`, with the error of every layer that both have.

    Raises:
        QuantizationError: The batches cannot be used, or outputs differ in shape.

    Examples:
        >>> import mlx.core as mx
        >>> reference = nn.Sequential(nn.Linear(64, 64))
        >>> model = nn.Sequential(nn.QuantizedLinear.from_linear(reference.layers[0], 64, 8))
        >>> report = quantization_report(model, reference, [mx.random.normal((4, 64))])
        >>> report.layers[0].snr_db > 30, report.accuracy.relative_error < 0.02
        (True, True)
    """
    judge, learn = read_batches(evaluation, "evaluation"), read_batches(calibration, "calibration")
    if not judge:
        raise QuantizationError("evaluation=None: a comparison needs batches to compare on.")
    after, before = WalkedModel(model), WalkedModel(reference)
    with same_random_stream():
        judge = resolve(before, judge, "evaluation", loss)
        comparison = prepare_evaluation(before, judge, loss, warnings=_overlap_warning(judge, learn))
        accuracy = comparison.side_by_side(after, before, progress=progress)
        report, notes = compare_layers(after, before), list[str]()
        timed, in_tokens = comparison.parts[0], comparison.kind == "tokens"
        times = _measured(partial(measure_before, before, timed, tokens_in=in_tokens, loss=loss), notes)
        speed = _measured(partial(measure_after, after, timed, times, loss=loss), notes) if times else None
        return replace(report, accuracy=accuracy, speed=speed, notes=(*report.notes, *notes))


def _measured(measure: Callable[[], T], notes: list[str]) -> T | None:
    """A measurement of speed, or None and a note that says why not."""
    try:
        return measure()
    except (RuntimeError, ValueError) as error:  # such as a stack of experts in bfloat16 on a CPU
        notes.append(f"Speed was not measured: MLX cannot run the model here with its weights as stored ({error}).")
        return None


def _overlap_warning(judge: list[Batch], learn: list[Batch]) -> tuple[str, ...]:
    """A warning if the model is judged on what it learned from."""
    evaluation, calibration = token_rows(judge), token_rows(learn)
    if not evaluation or not calibration:
        return ()
    share = overlap(evaluation, calibration)
    if share < _OVERLAP:
        return ()
    return (
        f"{format_percent(share)} of the evaluation's text is in the calibration too: the figures flatter a method "
        "that learned from it. Evaluate on text that was held out.",
    )
