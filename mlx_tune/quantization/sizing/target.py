"""Meeting a size: bits and group sizes layer by layer where they cost least, checked against one choice for all."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from mlx_tune.errors import QuantizationError
from mlx_tune.progress import progress_bar
from mlx_tune.quantization.formats.modes import AFFINE_GROUP_SIZES, FIXED_MODES, ITEM_BYTES, Format
from mlx_tune.quantization.judging.evaluation import Comparison, prepare
from mlx_tune.quantization.learning.coverage import measure_reach, note_of_unreached
from mlx_tune.quantization.learning.one_layer import apply_layer
from mlx_tune.quantization.models.batches import Batch, read_batches, rows_at_most
from mlx_tune.quantization.models.sites import why_not_quantizable
from mlx_tune.quantization.models.stored_outputs import OutputStore
from mlx_tune.quantization.models.transaction import Transaction
from mlx_tune.quantization.planning.kernels import FaultOf, Sieve
from mlx_tune.quantization.planning.overflow import formats_that_fit
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan, bytes_in, notes_of
from mlx_tune.quantization.sizing.allocate import allocate
from mlx_tune.quantization.sizing.sensitivity import divergence_of, measure_divergences, weight_errors
from mlx_tune.units import format_bytes, parse_bytes

#: Bits that a layer may get. One bit is left out: it costs more than leaving something else smaller would.
_BITS = (2, 3, 4, 5, 6, 8)

#: Tokens that sensitivities are measured on, and that both candidates are judged on.
_SENSITIVITY_TOKENS, _CHECK_TOKENS = 2048, 8192

#: What leaving a layer alone costs: nothing. Its key among the formats, and what it counts as in bits.
_ALONE, _ALONE_BITS = None, 16

Formats = dict[str, "Format | None"]


@dataclass(frozen=True)
class Allocation:
    """A plan that meets a size.

    Attributes:
        plan: The plan; its notes say how the choice was made and what it was compared with.
        costs: Path to the predicted divergence of the chosen format.
    """

    plan: QuantizationPlan
    costs: Mapping[str, float]


def parse_target(plan: QuantizationPlan, target_bpw: float | None, target_bytes: int | str | None) -> int:
    """The target in bytes of all parameters.

    Raises:
        QuantizationError: Both were given, or one that cannot be meant.
    """
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
    plan: QuantizationPlan,
    target_bytes: int,
    *,
    calibration: Iterable[Any] | None = None,
    evaluation: list[Batch] | None = None,
    progress: bool = False,
    fault_of: FaultOf | None = None,
) -> Allocation:
    """Choose a format for every layer of a plan that nothing else decides on.

    Args:
        plan: Whose layers to choose for.
        target_bytes: The limit of all parameters together.
        calibration: Batches to measure sensitivity on, and to check the choice; without, the weights' error counts.
        evaluation: The batches to check on where there is no calibration.
        progress: Show progress lines.
        fault_of: Finds what MLX computes wrong here, so that no layer gets such a format; None for not looking.

    Raises:
        QuantizationError: Not even the smallest formats fit.
    """
    batches = calibration if isinstance(calibration, list) and _are_batches(calibration) else None
    learn = batches if batches is not None else read_batches(calibration, "calibration")
    free = [layer for layer in (*plan.layers, *plan.skipped) if _is_free(layer, plan)]
    spent = plan.size_after_bytes - sum(layer.bytes_after for layer in free)
    errors: dict[str, dict[Format, float]] = {}
    with progress_bar("measuring weight errors", len(free), enabled=progress) as bar:
        for layer in free:
            fitting = formats_that_fit(layer, _formats_for(layer, plan), plan.method, plan.effort)
            errors[layer.path] = weight_errors(layer, fitting, plan.method)
            bar.advance()

    sieve = Sieve(errors, fault_of)
    sense, check = _split(learn)
    unseen: dict[str, str] = {}
    if sense:
        weights, unseen = _measured_weights(plan, free, errors, sense, target_bytes, progress, sieve)
        basis = f"each layer's effect on the model's answers, measured on {_amount(sense)} of the calibration"
    else:
        weights = {layer.path: 1.0 for layer in free}
        basis = "the weights' error, each layer counted alike, as there is no calibration"
    while True:
        chosen, costs = _picked(plan, free, errors, weights, unseen, target_bytes, spent, sieve)
        uniform = _best_uniform(plan, free, errors, weights, target_bytes - spent)
        both = [chosen, {} if uniform is None else {layer.path: layer.format for layer in uniform.layers}]
        if not sieve.take_out((layer, formats.get(layer.path)) for formats in both for layer in free):
            break
    mixed = plan.with_formats(chosen, "left alone by the allocation")
    notes = [
        f"Mixed formats for at most {format_bytes(target_bytes)} "
        f"({8 * target_bytes / plan.parameters:.3f} bits per weight), chosen by {basis}: {_spread(mixed)}."
    ]
    if uniform is None:
        notes.append("No single format for all layers meets the target, so there was none to compare with.")
    else:
        mixed, verdict = _checked(mixed, uniform, check or (evaluation or []), bool(check), progress)
        notes.append(verdict)
    kept = [note for note in plan.notes if note not in notes_of(plan.layers, plan.skipped)]  # on layers left unpacked
    notes += (*note_of_unreached(list(unseen)), *sieve.notes, *kept)
    mixed = mixed.with_remarks(unseen)
    return Allocation(replace(mixed, notes=(*notes_of(mixed.layers, mixed.skipped), *notes)), costs)


def _picked(
    plan: QuantizationPlan,
    free: list[LayerPlan],
    errors: dict[str, dict[Format, float]],
    weights: dict[str, float],
    unseen: dict[str, str],
    target_bytes: int,
    spent: int,
    sieve: Sieve,
) -> tuple[Formats, dict[str, float]]:
    """A format for each layer within the target, and its predicted cost."""
    choices: list[list[Format | None]] = [[*errors[layer.path], _ALONE] for layer in free]
    options = [
        [(x.bytes_before, 0.0) if f is None else (bytes_in(x, f), weights[x.path] * errors[x.path][f]) for f in formats]
        for x, formats in zip(free, choices, strict=True)
    ]
    picked = _allocate_seen_and_unseen(free, choices, options, errors, target_bytes - spent, unseen)
    if picked is None:
        least = spent + sum(min(size for size, _ in layer) for layer in options)
        raise QuantizationError(
            f"The target of {format_bytes(target_bytes)} ({8 * target_bytes / plan.parameters:.3f} bits per weight) "
            f"cannot be met: with every layer at its smallest the model takes {format_bytes(least)} "
            f"({8 * least / plan.parameters:.3f} bits per weight), {format_bytes(spent)} of it in what is not up for "
            "choice: layers with overrides, protected ones, those that cannot be quantized, and norms."
            + "".join(f" {note}" for note in sieve.notes)
        )
    return (
        {layer.path: choices[i][picked[i]] for i, layer in enumerate(free)},
        {layer.path: options[i][picked[i]][1] for i, layer in enumerate(free)},
    )


def _is_free(layer: LayerPlan, plan: QuantizationPlan) -> bool:
    """True where a layer is up for choice: also one that is left alone only because of its group size."""
    if layer.fixed:
        return False
    if layer.format is not None:
        return True
    whole = layer.dtype in ITEM_BYTES and layer.bytes_before >= layer.weights * ITEM_BYTES[layer.dtype]
    return whole and why_not_quantizable(layer.module, "affine") is None and bool(_formats_for(layer, plan))


def _are_batches(values: list[Any]) -> bool:
    return all(isinstance(value, Batch) for value in values)


def _formats_for(layer: LayerPlan, plan: QuantizationPlan) -> list[Format]:
    """Every format that the layer could have."""
    inner = layer.shape[-1]
    scales = None if plan.scale_dtype == layer.dtype else plan.scale_dtype
    sizes = [size for size in AFFINE_GROUP_SIZES if inner % size == 0]
    found = [Format(bits, size, scale_dtype=scales) for bits in _BITS for size in sizes]
    if plan.method in ("nearest", "optimal"):
        for mode, (size, bits) in FIXED_MODES.items():
            if inner % size == 0 and why_not_quantizable(layer.module, mode) is None:
                found.append(Format(bits, size, mode))
    if layer.format is not None and layer.format not in found:
        found.append(layer.format)
    return found


def _measured_weights(
    plan: QuantizationPlan,
    free: list[LayerPlan],
    errors: dict[str, dict[Format, float]],
    batches: list[Batch],
    target_bytes: int,
    progress: bool,
    sieve: Sieve,
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
        while errors[layer.path] and sieve.drops(layer, probe(layer)):
            pass
    measurable = [layer for layer in free if errors[layer.path]]
    if not measurable:
        return dict.fromkeys(errors, 1.0), {}
    model = measurable[0].model
    reach = measure_reach(model, measurable, batches)
    most = max(found.inputs for found in reach.values())
    reached = [layer for layer in measurable if reach[layer.path].enough(most)]
    measured = measure_divergences(
        model, reached, probe, batches, method=plan.method, effort=plan.effort, progress=progress
    )
    seen = {
        path: moved / error
        for path, (moved, error) in measured.items()
        if error > 0 and 0 < moved < math.inf  # also false where the model's answers are no numbers
    }
    unseen = {
        x.path: "its sensitivity could not be measured"
        if x.path in measured
        else "no calibration reached it"
        if not reach[x.path].inputs
        else "too little calibration reached it"
        for x in measurable
        # What lost nothing in its probe moved nothing, either.
        if x.path not in seen and not (x.path in measured and measured[x.path][1] == 0)
    }
    like = {layer.path: _like(layer, measurable, seen) for layer in free if layer.path not in seen}
    return seen | like, unseen


def _like(layer: LayerPlan, layers: list[LayerPlan], seen: Mapping[str, float]) -> float:
    """The sensitivity of layers like one: the median of those with its name, or of all."""

    def name(path: str) -> str:
        return path.rpartition(".")[2]

    known = [x for x in layers if x.path in seen]
    alike = [x for x in known if name(x.path) == name(layer.path) and x.kind == layer.kind] or known
    return statistics.median(seen[x.path] for x in alike) if alike else 1.0


def _allocate_seen_and_unseen(
    free: list[LayerPlan],
    choices: list[list[Format | None]],
    options: list[list[tuple[int, float]]],
    errors: dict[str, dict[Format, float]],
    budget: int,
    unseen: Mapping[str, str],
) -> list[int] | None:
    """The places of the best formats, none of an unseen layer with fewer bits than most of the others get."""
    best = allocate(options, budget)
    if best is None or not unseen or len(unseen) == len(free):
        return best

    def allowed(i: int, least: int) -> list[int]:
        """Places in a layer's formats that are wide enough, or lose nothing."""
        found = errors[free[i].path]
        wide = [k for k, f in enumerate(choices[i]) if f is None or f.bits >= least or found[f] == 0]
        return wide if free[i].path in unseen else list(range(len(choices[i])))

    for least in _BITS:
        places = [allowed(i, least) for i in range(len(free))]
        picked = allocate([[options[i][k] for k in some] for i, some in enumerate(places)], budget)
        if picked is None:
            break  # as wide as there is room for
        best = [places[i][k] for i, k in enumerate(picked)]
        chosen = [choices[i][k] for i, k in enumerate(best) if free[i].path not in unseen]
        widths = Counter(_ALONE_BITS if f is None else f.bits for f in chosen)
        if max(widths, key=lambda bits: (widths[bits], bits)) <= least:
            break
    return best


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


def _checked(
    mixed: QuantizationPlan, uniform: QuantizationPlan, batches: list[Batch], held_out: bool, progress: bool
) -> tuple[QuantizationPlan, str]:
    """The better of both by measurement, and a sentence that says so."""
    other = str(uniform.layers[-1].format) if uniform.layers else "nothing quantized"
    free = [layer for layer in uniform.layers if not layer.fixed]
    other = str(free[0].format) if free else other
    size = f"{uniform.bits_per_weight:.3f} bits per weight"
    if not batches:
        return mixed, f"Not checked against {other} everywhere ({size}), for want of calibration or evaluation."
    where = "calibration that was kept aside" if held_out else "the evaluation, as there is no calibration"
    model = mixed.layers[0].model if mixed.layers else uniform.layers[0].model
    comparison = prepare(model, batches, None)
    with OutputStore() as store:
        comparison.record(model, store, floor=False)
        ours, theirs = (_trial(plan, comparison, store, progress) for plan in (mixed, uniform))
    figures = (
        f"divergence {ours:.4g} mixed, {theirs:.4g} with {other} everywhere ({size}), on {_amount(batches)} of {where}"
    )
    if ours <= theirs:
        return mixed, f"Checked: {figures}."
    return uniform, f"The mixed choice was rejected: {figures}. {other} is used everywhere."


def _trial(plan: QuantizationPlan, comparison: Comparison, store: OutputStore, progress: bool) -> float:
    """The divergence of a plan, carried out and undone."""
    model = plan.layers[0].model
    method = "nearest" if plan.method == "nearest" else "optimal"
    with Transaction(model) as transaction, progress_bar("trying formats", len(plan.layers), enabled=progress) as bar:
        for layer in plan.layers:
            apply_layer(layer, method, plan.effort)
            bar.advance()
        found = divergence_of(comparison.judge(model, store))
        transaction.roll_back()
    return found


def _split(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to measure sensitivity on, and other ones to check the choice on."""
    if not batches:
        return [], []
    if any(batch.tokens is None for batch in batches):
        if len(batches) == 1:
            return batches, batches
        half = (len(batches) + 1) // 2
        return batches[:half], batches[half:]
    rows = [row for batch in batches for row in rows_at_most(batch, 1)]
    if len(rows) == 1:
        return rows, rows
    length = max(row.arguments[0].shape[1] for row in rows)
    first = max(1, min(len(rows) // 2, _SENSITIVITY_TOKENS // length))
    second = max(1, min(len(rows) - first, _CHECK_TOKENS // length))
    # Spread over the whole of it: neighbours are often cut from one document.
    odd, even = rows[::2], rows[1::2]
    return _joined(_spread_rows(odd, first)), _joined(_spread_rows(even, second))


def _spread_rows(rows: list[Batch], count: int) -> list[Batch]:
    step = max(1, len(rows) // max(1, count))
    return rows[::step][:count]


def _joined(rows: list[Batch]) -> list[Batch]:
    """Rows of one length together, so that the model is called less often."""
    import mlx.core as mx

    by_length: dict[int, list[mx.array]] = {}
    for row in rows:
        assert row.tokens is not None
        by_length.setdefault(row.tokens.shape[1], []).append(row.tokens)
    stacked = [mx.concatenate(parts) for parts in by_length.values()]
    return [Batch((tokens,), tokens) for tokens in stacked]


def _amount(batches: list[Batch]) -> str:
    tokens = sum(b.tokens.size for b in batches if b.tokens is not None)
    return f"{tokens:,} tokens" if tokens else f"{len(batches)} batches"


def _spread(plan: QuantizationPlan) -> str:
    """The number of layers in each format."""
    counts = Counter(str(layer.format) for layer in plan.layers if not layer.fixed)
    alone = sum(1 for layer in plan.skipped if layer.reason == "left alone by the allocation")
    texts = [f"{count} x {name}" for name, count in sorted(counts.items())]
    return "; ".join([*texts, *([f"{alone} x left alone"] if alone else [])])
