"""The searches of this library over mlx-lm's training step: memory, batch, and all of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.adapters import awake_adapters
from mlx_tune.lm.losses.next_token import Loss
from mlx_tune.lm.steps import training_step
from mlx_tune.units import Budget

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.optimizers import Optimizer
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.batching.result import AutobatchResult
    from mlx_tune.checkpointing.planning.checkpoint_plan import CheckpointPlan
    from mlx_tune.checkpointing.verify_report import VerifyReport
    from mlx_tune.fitting.result import Fit
    from mlx_tune.graphs.estimate import MemoryEstimate


def autobatch(
    model: nn.Module,
    dataset: object,
    args: TrainingArgs | None = None,
    *,
    optimizer: Optimizer | None = None,
    valid_set: object = None,
    loss: Loss | None = None,
    plain_loss: bool = False,
    budget: Budget = None,
    max_batch: int | None = None,
    **options: Any,
) -> AutobatchResult:
    """Find the largest batch that mlx-lm's trainer can train a model with in a memory budget.

    The trial is mlx-lm's own training step on the longest batch that the data set can give, so that no later batch
    needs more. Batches divide by the number of ranks, and are no larger than the data set, as mlx-lm wants it.

    Args:
        model: The model as it will be trained: adapters added, layers frozen, blocks checkpointed.
        dataset: A data set for mlx-lm's trainer, such as `mlx_lm.tuner.datasets.load_local_dataset` returns, or any
            sequence of `(tokens, offset)`.
        args: mlx-lm's `TrainingArgs`: `max_seq_length` and `grad_accumulation_steps` count, and `grad_checkpoint`
            checkpoints every block during the search; its defaults by default.
        optimizer: The optimizer; Adam, as mlx-lm's default, where None.
        valid_set: The validation set, if there is one: mlx-lm evaluates with the training batch, which therefore
            cannot be larger than it.
        loss: As mlx-lm's trainer takes it; by default `lm.loss` where it is exact, else mlx-lm's own;
            a note says which.
        plain_loss: Take mlx-lm's own loss, which holds the logits.
        budget: Bytes, text such as "24GB", a share of what is free such as 0.8, or None for `memory_budget()`.
        max_batch: The largest batch to consider.
        **options: Whatever else `mlx_tune.autobatch` takes, such as `target_batch` or `slowdown`.

    Returns:
        The result of `mlx_tune.autobatch`. Hand it to `lm.train(..., fit=result)`, or set `TrainingArgs.batch_size`
        and train under `result.applied()`.

    Raises:
        InvalidArgumentError: An empty data set, nothing to train, or `target_batch` together with accumulation.
        BudgetError: Not even one row for each rank fits.

    Examples:
        ```python
        result = lm.autobatch(model, train_set, TrainingArgs(max_seq_length=1024), budget="24GB")
        ```
    """
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.batching.autobatch import autobatch as find_batch

    args = TrainingArgs() if args is None else args
    if options.get("target_batch") is not None:
        _refuse_accumulation(args)
        # Micro-batches add to kept gradients: that is the step that has to fit.
        args = _with_accumulation(args)
    with (
        _checkpointed(model, args),
        training_step(
            model, optimizer_or_adam(optimizer), dataset, args, valid_set=valid_set, loss=loss, plain_loss=plain_loss
        ) as ready,
    ):
        found = find_batch(
            ready.step,
            ready.make_batch,
            budget=budget,
            max_batch=ready.max_batch if max_batch is None else min(max_batch, ready.max_batch),
            multiple_of=ready.multiple_of,
            state=ready.state,
            group=_group(ready.multiple_of),
            **options,
        )
        found = replace(found, notes=(*found.notes, *ready.notes))
    return found if options.get("target_batch") else replace(found, accumulation_steps=args.grad_accumulation_steps)


def estimate_memory(
    model: nn.Module,
    dataset: object,
    args: TrainingArgs | None = None,
    *,
    optimizer: Optimizer | None = None,
    loss: Loss | None = None,
    plain_loss: bool = False,
    backend: str | None = None,
) -> MemoryEstimate:
    """Compute the memory that mlx-lm's training step needs at the least, without running it.

    mlx-lm's trainer evaluates the state before the loss, and the step is priced so.

    Args:
        model: The model as it will be trained.
        dataset: A data set for mlx-lm's trainer.
        args: mlx-lm's `TrainingArgs`: `batch_size`, `max_seq_length`, `grad_accumulation_steps` and
            `grad_checkpoint` count.
        optimizer: The optimizer; Adam where None.
        loss: As mlx-lm's trainer takes it; by default `lm.loss` where it is exact, else mlx-lm's own;
            a note says which.
        plain_loss: Take mlx-lm's own loss, which holds the logits.
        backend: As `mlx_tune.estimate_memory` takes it: "metal", "cuda", "cpu", or None for this machine's.

    Returns:
        The result of `mlx_tune.estimate_memory`, for the longest batch.

    Examples:
        ```python
        print(lm.estimate_memory(model, train_set, TrainingArgs(batch_size=8)))
        ```
    """
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.graphs.estimate import estimate_memory as trace

    args = TrainingArgs() if args is None else args
    with (
        _checkpointed(model, args),
        training_step(
            model, optimizer_or_adam(optimizer), dataset, args, loss=loss, plain_loss=plain_loss, evaluate=False
        ) as ready,
    ):
        batch = ready.make_batch(args.batch_size)
        if ready.kept is None:
            found = trace(ready.step, batch, state=ready.state, backend=backend, state_first=True)
        else:  # what is kept counts among what the step is given
            step = partial(_accumulating, ready.step)
            found = trace(step, batch, ready.kept, state=ready.state, backend=backend, state_first=True)
        return replace(found, notes=(*found.notes, *ready.notes))


def _accumulating(step: Callable[..., object], batch: object, kept: object) -> object:
    return step(batch, kept=kept)


def autofit(
    model: nn.Module,
    dataset: object,
    args: TrainingArgs | None = None,
    *,
    optimizer: Optimizer | None = None,
    valid_set: object = None,
    loss: Loss | None = None,
    plain_loss: bool = False,
    budget: Budget = None,
    target_batch: int | None = None,
    max_batch: int | None = None,
    checkpoint: bool = True,
    **options: Any,
) -> Fit:
    """Choose checkpoints, batch, accumulation and limit together for mlx-lm's trainer: the most tokens a second.

    Args:
        model: The model as it will be trained, no block checkpointed.
        dataset: A data set for mlx-lm's trainer.
        args: mlx-lm's `TrainingArgs`; `max_seq_length` and `grad_accumulation_steps` count.
        optimizer: The optimizer; Adam where None.
        valid_set: The validation set, if there is one; a batch is no larger than it.
        loss: As mlx-lm's trainer takes it; by default the search chooses between `lm.loss` and mlx-lm's own where the
            former is exact, else it is mlx-lm's own. A note says which.
        plain_loss: Take mlx-lm's own loss, which holds the logits.
        budget: As for `mlx_tune.autofit`.
        target_batch: Rows that make up an update of the optimizer; None for whatever is fastest.
        max_batch: The largest batch to consider.
        checkpoint: True where to choose the blocks to checkpoint. Without, `args.grad_checkpoint` says whether all of
            them are, and the batch is chosen for that.
        **options: Whatever else `mlx_tune.autofit` takes.

    Returns:
        The result of `mlx_tune.autofit`. Hand it to `lm.train(..., fit=fit)`.

    Examples:
        ```python
        fit = lm.autofit(model, train_set, args, budget="24GB", target_batch=64)
        ```
    """
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.fitting.autofit import autofit as find_fit

    args = TrainingArgs() if args is None else args
    if target_batch is not None:
        _refuse_accumulation(args)
        args = _with_accumulation(args)
    with (
        nullcontext() if checkpoint else _checkpointed(model, args),
        training_step(
            model, optimizer_or_adam(optimizer), dataset, args, valid_set=valid_set, loss=loss, plain_loss=plain_loss
        ) as ready,
    ):
        step, linear_step = ready.losses
        found = find_fit(
            model,
            step,
            ready.make_batch,
            budget=budget,
            target_batch=target_batch,
            state=ready.state,
            max_batch=ready.max_batch if max_batch is None else min(max_batch, ready.max_batch),
            multiple_of=ready.multiple_of,
            checkpoint=checkpoint,
            group=_group(ready.multiple_of),
            linear_step=linear_step,
            **options,
        )
        found = replace(found, notes=(*found.notes, *ready.notes_for(found)))
    return found if target_batch else replace(found, accumulation_steps=args.grad_accumulation_steps)


def plan_checkpoints(
    model: nn.Module,
    dataset: object,
    args: TrainingArgs | None = None,
    *,
    optimizer: Optimizer | None = None,
    loss: Loss | None = None,
    plain_loss: bool = False,
    budget: Budget = None,
    **options: Any,
) -> CheckpointPlan:
    """Choose the blocks to checkpoint so that `args.batch_size` fits a budget and mlx-lm's trainer runs fastest.

    Args:
        model: The model as it will be trained, no block checkpointed.
        dataset: A data set for mlx-lm's trainer.
        args: mlx-lm's `TrainingArgs`.
        optimizer: The optimizer; Adam where None.
        loss: As mlx-lm's trainer takes it; by default the search chooses between `lm.loss` and mlx-lm's own where the
            former is exact, else it is mlx-lm's own. A note says which.
        plain_loss: Take mlx-lm's own loss, which holds the logits.
        budget: As for `mlx_tune.plan_checkpoints`.
        **options: Whatever else `mlx_tune.plan_checkpoints` takes.

    Returns:
        The result of `mlx_tune.plan_checkpoints`: train in `with plan.applied():`.

    Raises:
        InvalidArgumentError: There are several ranks; `lm.autofit` is what agrees across them.
        BudgetError: The batch does not fit with every block checkpointed.

    Examples:
        ```python
        plan = lm.plan_checkpoints(model, train_set, TrainingArgs(batch_size=16), budget="24GB")
        ```
    """
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.checkpointing.planning.plan import plan_checkpoints as plan

    args = TrainingArgs() if args is None else args
    with training_step(model, optimizer_or_adam(optimizer), dataset, args, loss=loss, plain_loss=plain_loss) as ready:
        if ready.multiple_of > 1:
            raise InvalidArgumentError(
                f"A plan is made on one machine, and here are {ready.multiple_of} ranks: call lm.autofit(..., "
                f"min_batch={args.batch_size}, max_batch={args.batch_size}), which agrees across them."
            )
        step, linear_step = ready.losses
        found = plan(
            model,
            step,
            ready.make_batch,
            batch_size=args.batch_size,
            budget=budget,
            state=ready.state,
            linear_step=linear_step,
            **options,
        )
        return replace(found, notes=(*found.notes, *ready.notes_for(found)))


def verify_checkpoint(
    model: nn.Module, dataset: object, args: TrainingArgs | None = None, *, loss: Loss | None = None
) -> VerifyReport:
    """Compare a model's gradients with and without checkpointing, on the longest batch of its data.

    An adapter begins with one factor at zero, and then the gradient of the other is zero both ways and says nothing. So
    such factors get small values for the comparison, which the report notes, and are zero again afterwards.

    Args:
        model: The model as it will be trained.
        dataset: A data set for mlx-lm's trainer.
        args: mlx-lm's `TrainingArgs`; `batch_size` and `max_seq_length` count.
        loss: As mlx-lm's trainer takes it; its own by default.

    Returns:
        The result of `mlx_tune.verify_checkpoint`; `.ok` is the verdict.

    Examples:
        ```python
        print(lm.verify_checkpoint(model, train_set, TrainingArgs(batch_size=1)))
        ```
    """
    from mlx_lm.tuner.trainer import TrainingArgs, default_loss

    from mlx_tune.checkpointing.verify import verify_checkpoint as verify

    args = TrainingArgs() if args is None else args
    with (
        training_step(model, optimizer_or_adam(None), dataset, args, loss=loss) as ready,
        awake_adapters(model) as awake,
    ):
        report = verify(model, default_loss if loss is None else loss, *ready.make_batch(args.batch_size))
    if not awake:
        return report
    note = f"{len(awake)} adapter parameters that are zero had small values for the comparison, and are zero again."
    return replace(report, notes=(*report.notes, note))


def optimizer_or_adam(optimizer: Optimizer | None) -> Optimizer:
    """The given optimizer; where there is none, Adam at the rate that mlx-lm's own commands begin with."""
    from mlx.optimizers import Adam

    return Adam(learning_rate=1e-5) if optimizer is None else optimizer


def _checkpointed(model: nn.Module, args: TrainingArgs) -> AbstractContextManager[object]:
    """Every block checkpointed for as long as the search runs, where the arguments ask for it."""
    from mlx_tune.checkpointing.blocks import checkpoint_blocks

    return checkpoint_blocks(model) if args.grad_checkpoint else nullcontext()


def _refuse_accumulation(args: TrainingArgs) -> None:
    if args.grad_accumulation_steps != 1:
        raise InvalidArgumentError(
            f"target_batch and grad_accumulation_steps={args.grad_accumulation_steps} both say how many batches make "
            "an update: leave grad_accumulation_steps at 1, the search chooses it."
        )


def _with_accumulation(args: TrainingArgs) -> TrainingArgs:
    return replace(args, grad_accumulation_steps=2)


def _group(ranks: int) -> mx.distributed.Group | None:
    """The group by which ranks agree on an answer; None where there is one."""
    if ranks == 1:
        return None
    import mlx.core as mx

    return mx.distributed.init()
