"""`lm.train`: mlx-lm's own trainer, run with what was found, and measured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_tune.batching.result import AutobatchResult
from mlx_tune.checkpointing.planning.checkpoint_plan import CheckpointPlan
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.files.scratch import writing
from mlx_tune.files.unfinished import beside
from mlx_tune.lm.fitting import autofit
from mlx_tune.lm.lengths.result import LongestSequence
from mlx_tune.lm.lengths.truncation import truncation
from mlx_tune.lm.losses.next_token import ChosenLoss, Loss, choose_loss
from mlx_tune.lm.steps import Row, as_rows, check_trainable, largest_batch
from mlx_tune.lm.training_result import LossReport, TrainingResult
from mlx_tune.lm.wiring import wired_for_training
from mlx_tune.memory import open_limit_bytes, track_memory
from mlx_tune.state import same_training
from mlx_tune.trees import nbytes_of
from mlx_tune.units import Budget

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx.optimizers import Optimizer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.fitting.result import Fit


def train(
    model: nn.Module,
    optimizer: Optimizer,
    train_set: object,
    valid_set: object = None,
    args: TrainingArgs | None = None,
    *,
    fit: Fit | AutobatchResult | CheckpointPlan | LongestSequence | Literal["auto"] | None = None,
    budget: Budget = None,
    target_batch: int | None = None,
    loss: Loss | None = None,
    plain_loss: bool = False,
    training_callback: TrainingCallback | None = None,
) -> TrainingResult:
    """Train with mlx-lm's own trainer, under the batch, checkpoints and limit that were found, and say what it took.

    mlx-lm's loop does the training. Around it: blocks are checkpointed by this library, with the gradients of
    the plain model, in place of mlx-lm's `grad_checkpoint`, and are plain again afterwards; the memory limit holds
    for the run; the model is wired where the backend can and the memory limit is not tight, and the wired limit, which
    mlx-lm raises and leaves, is back at what it was; adapter files appear whole.
    Under `mlx.launch` every rank calls this, and gradients are averaged as mlx-lm does.

    Args:
        model: The model as it is to be trained: adapters added, layers frozen.
        optimizer: Any of MLX's.
        train_set: A data set for mlx-lm's trainer: one of those that `mlx_lm.tuner.datasets.load_local_dataset`
            returns, a `CacheDataset`, or any sequence of `(tokens, offset)`.
        valid_set: The same to evaluate on, or None.
        args: mlx-lm's `TrainingArgs`; its defaults by default. `grad_checkpoint` checkpoints every block.
        fit: The result of `lm.autofit`, `lm.autobatch`, `lm.plan_checkpoints` or `lm.longest_sequence`: its batch,
            accumulation, checkpoints, loss, tiles, length of rows and limit replace those of `args`. "auto" calls
            `lm.autofit` first. `iters` stays the number of batches.
        budget: For fit="auto": the memory to stay within.
        target_batch: For fit="auto": rows that make up an update of the optimizer.
        loss: As mlx-lm's trainer takes it; by default `lm.loss` where it is exact, else mlx-lm's own. The result says
            which, and why.
        plain_loss: Take mlx-lm's own loss, which holds the logits.
        training_callback: mlx-lm's `TrainingCallback`; it is told everything as by mlx-lm itself.

    Returns:
        Peak, footprint, rate, losses and everything that was chosen.

    Raises:
        InvalidArgumentError: A batch that mlx-lm would refuse: larger than a data set, or not divisible by the number
            of ranks; `budget` or `target_batch` without fit="auto".
        BudgetError: fit="auto", and not even one row fits.
        DiskError: Too little free disk for the adapters, or they cannot be written.

    Examples:
        ```python
        result = lm.train(model, optimizer, train_set, valid_set, TrainingArgs(iters=600), fit="auto", budget="24GB")
        print(result)
        ```
    """
    from mlx_lm.tuner import trainer

    args = trainer.TrainingArgs() if args is None else args
    if fit != "auto" and (budget is not None or target_batch is not None):
        raise InvalidArgumentError('budget and target_batch say how to search: pass fit="auto" with them.')
    check_trainable(model)
    train_rows = as_rows(train_set)
    valid_rows = as_rows(valid_set) if valid_set else None
    chosen: Fit | AutobatchResult | CheckpointPlan | LongestSequence | None
    if isinstance(fit, str):
        if fit != "auto":
            raise InvalidArgumentError(f'fit={fit!r}: pass "auto", or what autofit or autobatch returned.')
        chosen = autofit(
            model,
            train_rows,
            replace(args, grad_checkpoint=False),
            optimizer=optimizer,
            valid_set=valid_rows,
            loss=loss,
            plain_loss=plain_loss,
            budget=budget,
            target_batch=target_batch,
        )
    else:
        chosen = fit
    # What chose among the blocks brings its own checkpoints; everything else goes with those of the arguments.
    chose_blocks = isinstance(chosen, CheckpointPlan) or bool(getattr(chosen, "found", 0))
    if isinstance(chosen, LongestSequence):
        chose_blocks = chosen.way.checkpoint
        args = replace(args, max_seq_length=chosen.max_seq_length)
    every_block = args.grad_checkpoint and not chose_blocks
    args = replace(args, grad_checkpoint=False)
    if chosen is not None:
        args = replace(args, batch_size=chosen.batch_size)
        if not isinstance(chosen, CheckpointPlan):  # a plan says nothing of accumulation
            args = replace(args, grad_accumulation_steps=chosen.accumulation_steps)
    _check_batch(args.batch_size, train_rows, valid_rows)
    trained_on = choose_loss(model, loss, plain=plain_loss, fit=chosen)
    return _run(model, optimizer, train_rows, valid_rows, args, chosen, every_block, trained_on, training_callback)


def _run(
    model: nn.Module,
    optimizer: Optimizer,
    train_rows: Sequence[Row],
    valid_rows: Sequence[Row] | None,
    args: TrainingArgs,
    fit: Fit | AutobatchResult | CheckpointPlan | LongestSequence | None,
    every_block: bool,
    loss: ChosenLoss,
    training_callback: TrainingCallback | None,
) -> TrainingResult:
    """mlx-lm's trainer, with everything set around it and put back behind it."""
    import mlx.core as mx
    from mlx_lm.tuner import trainer

    from mlx_tune.checkpointing.block.wrap import is_checkpointed
    from mlx_tune.checkpointing.blocks import checkpoint_blocks

    log = _recorder(training_callback)
    with ExitStack() as around:
        around.enter_context(same_training(model))
        if fit is not None:
            around.enter_context(fit.applied())
        if every_block:
            around.enter_context(checkpoint_blocks(model))
        checkpointed = tuple(path for path, block in reversed(model.named_modules()) if is_checkpointed(block))
        limit = open_limit_bytes()
        wired = around.enter_context(wired_for_training(model))
        files = around.enter_context(_appearing_whole(Path(args.adapter_file), nbytes_of(model.trainable_parameters())))

        def iterate_batches(**options: object) -> Iterator[object]:
            wired.hold()  # mlx-lm has just wired all that the system recommends
            for batch in trainer.iterate_batches(**options):
                files.publish()
                yield batch

        memory = around.enter_context(track_memory())
        trainer.train(
            model=model,
            optimizer=optimizer,
            train_dataset=train_rows,
            val_dataset=valid_rows,
            args=replace(args, adapter_file=files.staged),
            loss=loss.function,
            iterate_batches=iterate_batches,
            training_callback=log,
        )
        mx.synchronize()
        files.publish()
    return TrainingResult(
        iterations=args.iters,
        batch_size=args.batch_size,
        accumulation_steps=args.grad_accumulation_steps,
        ranks=mx.distributed.init().size(),
        tokens=log.tokens,
        tokens_per_second=log.tokens / log.seconds if log.seconds else 0.0,
        seconds=memory.seconds,
        peak_bytes=memory.peak_bytes,
        cache_bytes=memory.cache_bytes,
        footprint_bytes=memory.footprint_bytes,
        limit_bytes=limit,
        checkpointed=checkpointed,
        wired=wired.text,
        loss=loss.text,
        truncation=str(truncation(train_rows, args.max_seq_length)),
        losses=tuple(log.losses),
        validation_losses=tuple(log.validations),
        adapter_file=str(args.adapter_file),
        fit=None if fit is None else fit.to_dict(),
    )


def _check_batch(batch_size: int, train_rows: Sized, valid_rows: Sized | None) -> None:
    """Refuse beforehand what mlx-lm would refuse in the middle."""
    import mlx.core as mx

    ranks = mx.distributed.init().size()
    if batch_size < 1 or batch_size % ranks:
        raise InvalidArgumentError(f"batch_size={batch_size}: it must be a positive multiple of the {ranks} ranks.")
    if batch_size > largest_batch(train_rows, valid_rows, ranks):
        rows = f"{len(train_rows)} training rows"
        if valid_rows is not None:
            rows += f" and {len(valid_rows)} validation rows (mlx-lm evaluates with the training batch)"
        raise InvalidArgumentError(f"batch_size={batch_size} is more than the data has: {rows}.")


def _recorder(inner: TrainingCallback | None) -> Any:
    """A callback that notes what mlx-lm reports, and hands it on to the user's own."""
    from mlx_lm.tuner.callbacks import TrainingCallback

    class Recorder(TrainingCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.losses: list[LossReport] = []
            self.validations: list[LossReport] = []
            self.tokens = 0
            self.seconds = 0.0

        def on_train_loss_report(self, train_info: dict[str, float]) -> None:
            tokens, rate = int(train_info["trained_tokens"]), float(train_info["tokens_per_second"])
            self.seconds += (tokens - self.tokens) / rate
            self.tokens = tokens
            self.losses.append(LossReport(int(train_info["iteration"]), tokens, float(train_info["train_loss"]), rate))
            if inner is not None:
                inner.on_train_loss_report(train_info)

        def on_val_loss_report(self, val_info: dict[str, float]) -> None:
            self.validations.append(LossReport(int(val_info["iteration"]), self.tokens, float(val_info["val_loss"])))
            if inner is not None:
                inner.on_val_loss_report(val_info)

    return Recorder()


class _Staging:
    """Files that are written beside their place and renamed into it when they are whole."""

    def __init__(self, target: Path, folder: Path) -> None:
        self.target = target
        self.staged = folder / target.name
        self._folder = folder

    def publish(self) -> None:
        """Move every file that was written so far."""
        for file in sorted(self._folder.iterdir()):
            os.replace(file, self.target.parent / file.name)


@contextmanager
def _appearing_whole(target: Path, needed_bytes: int) -> Iterator[_Staging]:
    """A place for mlx-lm to save to, so that a run that is killed leaves no half of a file under a real name."""
    way_out = "Name a file on a larger disk as args.adapter_file."
    with (
        beside(target) as folder,
        writing(target.parent, "What is trained", needed_bytes=needed_bytes, way_out=way_out),
    ):
        yield _Staging(target, folder)
