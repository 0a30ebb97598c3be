"""Plans that meet a size, tried on batches one after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import mlx.nn as nn

from mlx_tune.progress import progress_bar
from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.models.batches import Batch, rows_at_most
from mlx_tune.quantization.models.sites import Site, WalkedModel
from mlx_tune.quantization.models.transaction import Transaction
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan

#: Takes down a model's answers to batches; the function that it hands the block tells how far they have moved since.
Watch = Callable[[WalkedModel, list[Batch]], AbstractContextManager[Callable[[], float]]]

#: Quantizes one planned layer by a method and an effort, and has the last function put it in the places of a site.
Apply = Callable[[LayerPlan, str, Effort, Callable[[Site, nn.Module], None]], object]

#: Tokens that sensitivities are measured on, and that both candidates are judged on.
_SENSITIVITY_TOKENS, _CHECK_TOKENS = 2048, 8192


def better_of(
    model: WalkedModel,
    mixed: QuantizationPlan,
    uniform: QuantizationPlan,
    batches: list[Batch],
    *,
    watch: Watch,
    apply: Apply,
    held_out: bool,
    progress: bool = False,
) -> tuple[QuantizationPlan, str]:
    """The better of both by measurement, and a sentence that says so.

    Args:
        model: The model of both plans; it is as it was when this returns or fails.
        mixed: The plan with formats layer by layer.
        uniform: The plan with one format.
        batches: The batches to try both on; where there are none, the first is taken.
        watch: Tells how far a model's answers move.
        apply: Quantizes one planned layer by "nearest" or "optimal".
        held_out: True where these are calibration that nothing was measured on.
        progress: Show progress lines.
    """
    other = str(uniform.layers[-1].format) if uniform.layers else "nothing quantized"
    free = [layer for layer in uniform.layers if not layer.fixed]
    other = str(free[0].format) if free else other
    size = f"{uniform.bits_per_weight:.3f} bits per weight"
    if not batches:
        return mixed, f"Not checked against {other} everywhere ({size}), for want of calibration or evaluation."
    where = "calibration that was kept aside" if held_out else "the evaluation, as there is no calibration"
    with watch(model, batches) as divergence:
        ours, theirs = (_trial(model, plan, divergence, apply, progress) for plan in (mixed, uniform))
    figures = (
        f"divergence {ours:.4g} mixed, {theirs:.4g} with {other} everywhere ({size}), on {amount(batches)} of {where}"
    )
    if ours <= theirs:
        return mixed, f"Checked: {figures}."
    return uniform, f"The mixed choice was rejected: {figures}. {other} is used everywhere."


def _trial(
    model: WalkedModel, plan: QuantizationPlan, divergence: Callable[[], float], apply: Apply, progress: bool
) -> float:
    """The divergence of a plan, carried out and undone."""
    method = "nearest" if plan.method == "nearest" else "optimal"
    with Transaction(model) as transaction, progress_bar("trying formats", len(plan.layers), enabled=progress) as bar:
        for layer in plan.layers:
            apply(layer, method, plan.effort, transaction.replace)
            bar.advance()
        found = divergence()
        transaction.roll_back()
    return found


def split_batches(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
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


def amount(batches: list[Batch]) -> str:
    tokens = sum(b.tokens.size for b in batches if b.tokens is not None)
    return f"{tokens:,} tokens" if tokens else f"{len(batches)} batches"
