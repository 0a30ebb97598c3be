"""Meeting a size: bits and group sizes layer by layer where they cost least, checked against one choice for all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real

import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.progress import progress_bar
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.checks import formats_that_fit
from mlx_tune.quantization.planning.excluded_formats import ExcludedFormats, FaultOf
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan, bytes_in, notes_of
from mlx_tune.quantization.planning.request import Request
from mlx_tune.quantization.sizing.candidates import BITS, formats_for, is_free
from mlx_tune.quantization.sizing.coverage import measure_coverage
from mlx_tune.quantization.sizing.late_starts import LateStarts
from mlx_tune.quantization.sizing.measurements import Measurements, measurements_of
from mlx_tune.quantization.sizing.plan_trials import Apply, Watch, amount, better_of, split_batches
from mlx_tune.quantization.sizing.sensitivity import measure_divergences, weight_errors
from mlx_tune.quantization.sizing.unreached_layers import allocate_with_unmeasured, note_of_unreached, sensitivity_like
from mlx_tune.units import format_bytes, parse_bytes

Formats = dict[str, "Format | None"]


def parse_target(plan: QuantizationPlan, request: Request) -> int:
    """The target in bytes of all parameters.

    Raises:
        QuantizationError: Both were given, or one that cannot be meant.
    """
    target_bpw, target_bytes = request.target_bpw, request.target_bytes
    if target_bpw is not None and target_bytes is not None:
        raise QuantizationError(
            f"target_bpw={target_bpw!r} and target_bytes={target_bytes!r} say the same in two ways: give one of them."
        )
    if target_bytes is not None:
        return parse_bytes(target_bytes)
    if isinstance(target_bpw, bool) or not isinstance(target_bpw, Real) or not 0 < target_bpw < 64:
        raise QuantizationError(f"target_bpw={target_bpw!r} must be a number of bits per weight, such as 4.5.")
    return int(target_bpw * plan.parameters / 8)


def allocate_to_target(
    model: WalkedModel,
    plan: QuantizationPlan,
    request: Request,
    *,
    watch: Watch,
    apply: Apply,
    calibration: list[Batch],
    evaluation: list[Batch],
    blocks: Sequence[tuple[str, nn.Module]] = (),
    progress: bool = False,
    fault_of: FaultOf | None = None,
) -> QuantizationPlan:
    """Choose a format for every layer of a plan that nothing else decides on.

    Args:
        model: The model, which is as it was when this returns or fails.
        plan: Its plan.
        request: Sets the limit of all parameters together.
        watch: Tells how far a model's answers move.
        apply: Quantizes one planned layer by "nearest" or "optimal".
        calibration: Batches to measure sensitivity on, and to check the choice; without, the weights' error counts.
        evaluation: The batches to check on where there is no calibration.
        blocks: The model's blocks, so that none runs again that a change of one layer does not reach.
        progress: Show progress lines.
        fault_of: Finds what MLX computes wrong here, so that no layer gets such a format; None for not looking.

    Returns:
        The plan; its notes say how the choice was made and what it was compared with.

    Raises:
        QuantizationError: The target cannot be meant, or not even the smallest formats fit.
    """
    target_bytes = parse_target(plan, request)
    free = [layer for layer in (*plan.layers, *plan.skipped) if is_free(layer, plan)]
    spent = plan.size_after_bytes - sum(layer.bytes_after for layer in free)
    # Without calibration a look at samples of the weights is less work than telling one model from another.
    known = measurements_of(model.sites, plan, calibration) if calibration else Measurements()
    errors: dict[str, dict[Format, float]] = {}
    with progress_bar("measuring weight errors", len(free), enabled=progress) as bar:
        for layer in free:
            fitting = formats_that_fit(layer, formats_for(layer, plan), plan.method, plan.effort)
            found = known.errors.setdefault(layer.path, {})
            if any(wanted not in found for wanted in fitting):
                found |= weight_errors(layer, fitting, plan.method)
            errors[layer.path] = {wanted: found[wanted] for wanted in fitting}
            bar.advance()

    excluded = ExcludedFormats(errors, fault_of)
    sense, check = split_batches(calibration)
    unseen: dict[str, str] = {}
    if sense:
        before = set(known.divergences)
        weights, unseen = _measured_weights(
            model,
            plan,
            free,
            errors,
            sense,
            known,
            target_bytes=target_bytes,
            watch=watch,
            blocks=blocks,
            excluded=excluded,
            progress=progress,
        )
        basis = f"each layer's effect on the model's answers, measured on {amount(sense)} of the calibration"
        if before and before == set(known.divergences):
            basis += " for an earlier size"
    else:
        weights = {layer.path: 1.0 for layer in free}
        basis = "the weights' error, each layer counted alike, as there is no calibration"
    while True:
        chosen = _picked(plan, free, errors, weights, unseen, target_bytes, spent, excluded)
        uniform = _best_uniform(plan, free, errors, weights, target_bytes - spent)
        both = [chosen, {} if uniform is None else {layer.path: layer.format for layer in uniform.layers}]
        if not excluded.take_out((layer, formats.get(layer.path)) for formats in both for layer in free):
            break
    mixed = plan.with_formats(chosen, "left alone by the allocation")
    notes = [
        f"Mixed formats for at most {format_bytes(target_bytes)} "
        f"({8 * target_bytes / plan.parameters:.3f} bits per weight), chosen by {basis}: {_spread(mixed)}."
    ]
    if uniform is None:
        notes.append("No single format for all layers meets the target, so there was none to compare with.")
    else:
        mixed, verdict = better_of(
            model,
            mixed,
            uniform,
            check or evaluation,
            watch=watch,
            apply=apply,
            held_out=bool(check),
            progress=progress,
        )
        notes.append(verdict)
    kept = [note for note in plan.notes if note not in notes_of(plan.layers, plan.skipped)]  # on layers left unpacked
    notes += (*note_of_unreached(list(unseen)), *excluded.notes, *kept)
    mixed = mixed.with_remarks(unseen)
    return replace(mixed, notes=(*notes_of(mixed.layers, mixed.skipped), *notes))


def _measured_weights(
    model: WalkedModel,
    plan: QuantizationPlan,
    free: list[LayerPlan],
    errors: dict[str, dict[Format, float]],
    batches: list[Batch],
    known: Measurements,
    *,
    target_bytes: int,
    watch: Watch,
    blocks: Sequence[tuple[str, nn.Module]],
    excluded: ExcludedFormats,
    progress: bool,
) -> tuple[dict[str, float], dict[str, str]]:
    """Divergence of the model for each unit of a layer's weight error, measured near the size that is wanted.

    And why it could not be measured, by path, for layers that get that of others like them.
    """
    bits_each = 8 * target_bytes / plan.parameters

    def probe(layer: LayerPlan) -> Format:
        affine = [f for f in errors[layer.path] if f.mode == "affine"] or list(errors[layer.path])
        # Just below the target: errors large enough to measure, small enough to add up.
        return min(affine, key=lambda f: (abs(f.bits + 0.5 - bits_each), abs(f.group_size - 64)))

    for layer in free:
        while errors[layer.path] and excluded.drops(layer, probe(layer)):
            pass
    measurable = [layer for layer in free if errors[layer.path]]
    if not measurable:
        return dict.fromkeys(errors, 1.0), {}
    coverage, steps = measure_coverage(model, measurable, batches, blocks)
    most = max(found.inputs for found in coverage.values())
    reached = [layer for layer in measurable if coverage[layer.path].enough(most)]
    probes = {layer.path: probe(layer) for layer in reached}
    new = [layer for layer in reached if known.near(layer.path, probes[layer.path]) is None]
    if new:
        with (
            watch(model, batches) as divergence,
            LateStarts(steps, blocks, divergence) as late,
        ):
            found = measure_divergences(
                new, probe, late.divergence, method=plan.method, effort=plan.effort, progress=progress
            )
        known.divergences |= {(path, probes[path]): figures for path, figures in found.items()}
    measured = {x.path: figures for x in reached if (figures := known.near(x.path, probes[x.path])) is not None}
    seen = {
        path: moved / error
        for path, (moved, error) in measured.items()
        if error > 0 and 0 < moved < math.inf  # also false where the model's answers are no numbers
    }
    unseen = {
        x.path: "its sensitivity could not be measured"
        if x.path in measured
        else "no calibration reached it"
        if not coverage[x.path].inputs
        else "too little calibration reached it"
        for x in measurable
        # What lost nothing in its probe moved nothing, either.
        if x.path not in seen and not (x.path in measured and measured[x.path][1] == 0)
    }
    like = {layer.path: sensitivity_like(layer, measurable, seen) for layer in free if layer.path not in seen}
    return seen | like, unseen


def _picked(
    plan: QuantizationPlan,
    free: list[LayerPlan],
    errors: dict[str, dict[Format, float]],
    weights: dict[str, float],
    unseen: dict[str, str],
    target_bytes: int,
    spent: int,
    excluded: ExcludedFormats,
) -> Formats:
    """A format for each layer within the target."""
    choices: list[list[Format | None]] = [[*errors[layer.path], None] for layer in free]
    options = [
        [(x.bytes_before, 0.0) if f is None else (bytes_in(x, f), weights[x.path] * errors[x.path][f]) for f in formats]
        for x, formats in zip(free, choices, strict=True)
    ]
    picked = allocate_with_unmeasured(free, choices, options, errors, target_bytes - spent, unseen, BITS)
    if picked is None:
        least = spent + sum(min(size for size, _ in layer) for layer in options)
        raise QuantizationError(
            f"The target of {format_bytes(target_bytes)} ({8 * target_bytes / plan.parameters:.3f} bits per weight) "
            f"cannot be met: with every layer at its smallest the model takes {format_bytes(least)} "
            f"({8 * least / plan.parameters:.3f} bits per weight), {format_bytes(spent)} of it in what is not up for "
            "choice: layers with overrides, protected ones, those that cannot be quantized, and norms."
            + "".join(f" {note}" for note in excluded.notes)
        )
    return {layer.path: choices[i][picked[i]] for i, layer in enumerate(free)}


def _best_uniform(
    plan: QuantizationPlan,
    free: list[LayerPlan],
    errors: dict[str, dict[Format, float]],
    weights: dict[str, float],
    budget: int,
) -> QuantizationPlan | None:
    """The best single format for all layers that are up for choice, within the same bytes."""
    every = dict.fromkeys(f for layer in free for f in errors[layer.path])

    def plain(wanted: Format) -> Formats:
        """That format for every layer that can have it."""
        return {layer.path: wanted if wanted in errors[layer.path] else None for layer in free}

    def size(wanted: Format) -> int:
        return sum(bytes_in(x, wanted) if wanted in errors[x.path] else x.bytes_before for x in free)

    def cost(wanted: Format) -> float:
        return sum(weights[x.path] * errors[x.path].get(wanted, 0.0) for x in free)

    fitting = [wanted for wanted in every if size(wanted) <= budget]
    if not fitting:
        return None
    return plan.with_formats(plain(min(fitting, key=cost)), "the format does not fit it")


def _spread(plan: QuantizationPlan) -> str:
    """The number of layers in each format."""
    counts = Counter(str(layer.format) for layer in plan.layers if not layer.fixed)
    alone = sum(1 for layer in plan.skipped if layer.reason == "left alone by the allocation")
    texts = [f"{count} x {name}" for name, count in sorted(counts.items())]
    return "; ".join([*texts, *([f"{alone} x left alone"] if alone else [])])
