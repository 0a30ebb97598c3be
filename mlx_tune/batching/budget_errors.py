"""The error of `autobatch` when nothing fits: by how much, and what could be given up."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from mlx_tune.batching.session import Session
from mlx_tune.errors import BudgetError, CheckpointError, TraceError
from mlx_tune.measuring.step_floor import StepFloor
from mlx_tune.memory import MemoryBudget
from mlx_tune.trees import nbytes_of, outermost
from mlx_tune.units import format_bytes


def used_up(budget: MemoryBudget, state: object) -> None:
    """See that what is held already leaves something of the budget.

    Raises:
        BudgetError: It does not; the text has the sizes.
    """
    import mlx.core as mx

    held = mx.get_active_memory()
    if held < int(budget):
        return
    own = nbytes_of(state)
    raise BudgetError(
        f"The budget of {budget} is used up before the first step: MLX's arrays hold {format_bytes(held)}, and the "
        f"model and optimizer in state= take {format_bytes(own)} once all of them are there. Give a larger budget, or "
        f"quantize the model first (quantize_model, or mlx-tune quantize).",
        needed_bytes=held,
        budget_bytes=int(budget),
    )


def too_large(
    session: Session, budget: MemoryBudget, *, estimated: tuple[object, object, object] | None = None
) -> BudgetError:
    """The error for a smallest size that does not fit.

    Args:
        session: The search.
        budget: The budget.
        estimated: Step, make_batch and state, for an estimate of what is kept for the backward pass.
    """
    trial = session.known[session.sizes[0]]
    size, needed = trial.batch_size, trial.held_bytes or trial.predicted_bytes
    untried = trial.peak_bytes is None and trial.held_bytes is None
    if needed is None or needed <= session.budget_bytes or (trial.reason and trial.reason != "predicted, not tried"):
        why = trial.reason or "its steps went above it"
        return BudgetError(f"Batch size {size} does not fit the budget of {budget}: {why}.", budget_bytes=int(budget))
    return BudgetError(
        f"Batch size {size} does not fit: a step {'is predicted to take' if untried else 'takes'} "
        f"at least {format_bytes(needed)}, {format_bytes(needed - session.budget_bytes)} more than the "
        f"budget of {budget}.{_advice(size, session.budget_bytes, estimated)}",
        needed_bytes=needed,
        budget_bytes=int(budget),
    )


def _advice(size: int, budget_bytes: int, estimated: tuple[Any, Any, object] | None) -> str:
    """Things that could be given up, and their savings according to the graph."""
    plain = "Shorter rows, or mlx_tune.checkpoint_blocks(model), may bring it down."
    if estimated is None:
        return f" {plain}"
    from mlx_tune.graphs.estimate import estimate_memory

    step, make_batch, state = estimated
    try:
        kept = estimate_memory(step, make_batch(size), state=state).activations_bytes
    except TraceError:
        return f" {plain}"
    saved = _saved_by_checkpoints(size, estimated)
    if saved is not None:
        needed, less = saved
        over = needed - budget_bytes
        plain = (
            f"With mlx_tune.checkpoint_blocks(model) the step is predicted to take {format_bytes(needed)}, "
            f"{format_bytes(less)} less, "
            + ("which fits." if over <= 0 else f"still {format_bytes(over)} too much: shorten the rows as well.")
        )
    return f" {format_bytes(kept)} of it are activations kept for the backward pass. {plain}"


def _saved_by_checkpoints(size: int, estimated: tuple[Any, Any, object]) -> tuple[int, int] | None:
    """The step's needs with every block checkpointed, and how much less that is; None where it is not less."""
    import mlx.nn as nn

    from mlx_tune.checkpointing.blocks import checkpoint_blocks

    floor = StepFloor(*estimated)
    with ExitStack() as undone:
        try:
            plain = floor(size).bytes
            for model in outermost(estimated[2], nn.Module):
                undone.enter_context(checkpoint_blocks(model))
            needed = floor(size).bytes
        except (TraceError, CheckpointError):
            return None
    return (needed, plain - needed) if needed < plain else None
