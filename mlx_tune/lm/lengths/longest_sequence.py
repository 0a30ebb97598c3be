"""The longest row that a training step takes in a budget: predicted for each way to train, and confirmed by a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from mlx_tune.errors import BudgetError, CheckpointError, InvalidArgumentError
from mlx_tune.lm.fitting import estimate_memory, optimizer_or_adam
from mlx_tune.lm.lengths.result import LongestSequence, Way
from mlx_tune.lm.lengths.truncation import truncation
from mlx_tune.lm.steps import as_rows, row_of, training_step
from mlx_tune.measuring.step import run_step
from mlx_tune.memory import resolve_budget
from mlx_tune.state import Snapshot
from mlx_tune.units import Budget, format_bytes, whole_number

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx.optimizers import Optimizer
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.lm.losses.next_token import Loss

#: mlx-lm pads rows to one more than a multiple of the first; MLX's attention on CUDA has a fused gradient where a row,
#: without its last token, is a multiple of the second, and is quadratic in memory elsewhere.
_PAD, _TILE = 32, 128
#: The share of a length that a search leaves undecided.
_PRECISION = 1 / 32
#: Steps that are run at the most, each with shorter rows than the one before.
_MOST_STEPS = 4


def longest_sequence(
    model: nn.Module,
    dataset: object,
    args: TrainingArgs | None = None,
    *,
    optimizer: Optimizer | None = None,
    loss: Loss | None = None,
    plain_loss: bool = False,
    budget: Budget = None,
    max_length: int | None = None,
    tokens: int = 1024,
) -> LongestSequence:
    """Find how long the rows of a batch may be in a memory budget, and the way to train on them.

    Three ways are looked at, the cheapest first: as the model is, with every block checkpointed, and with its MLPs
    tiled besides; each with the loss that never holds all logits, where that is exact. The step's graph says how long
    a row each takes at the least memory. The first way that takes the longest row wins, or else the one that takes
    most. One real step on a row of that length, under a memory limit of the budget, confirms it; where it holds more,
    rows become shorter. No row is tried that is predicted not to fit.

    Args:
        model: The model as it will be trained, adapters added, no block checkpointed.
        dataset: A data set for mlx-lm's trainer; its tokens are what rows are made of.
        args: mlx-lm's `TrainingArgs`: `batch_size` and `grad_accumulation_steps` count; with `grad_checkpoint` there
            is no way without checkpoints.
        optimizer: The optimizer; Adam where None.
        loss: As `lm.train` takes it.
        plain_loss: Take mlx-lm's own loss, which holds the logits.
        budget: Bytes, text such as "24GB", a share of what is free such as 0.8, or None for `memory_budget()`.
        max_length: Tokens of the longest row to consider; those of the data set's longest by default.
        tokens: The positions of a piece, as `tile` takes them.

    Returns:
        The answer. Hand it to `lm.train(..., fit=answer)`, or train under `answer.applied()` with its
        `max_seq_length`.

    Raises:
        BudgetError: Not even a short row fits.
        InvalidArgumentError: An empty data set, nothing to train, several ranks, or a number below 1.

    Examples:
        ```python
        answer = lm.longest_sequence(model, train_set, TrainingArgs(batch_size=1), budget="24GB")
        ```
    """
    import mlx.core as mx
    from mlx_lm.tuner.trainer import TrainingArgs

    args = TrainingArgs() if args is None else args
    if mx.distributed.init().size() > 1:
        raise InvalidArgumentError("The longest row is found on one machine: call lm.longest_sequence there.")
    optimizer = optimizer_or_adam(optimizer)
    allowed = int(resolve_budget(budget))
    whole_number(tokens, "tokens", least=1)
    data = as_rows(dataset)
    cut = truncation(data, whole_number(max_length, "max_length", least=1) if max_length is not None else 1)
    most = cut.longest if max_length is None else cut.max_length
    text = row_of(data[0])[0]
    options: dict[str, Any] = {"optimizer": optimizer, "loss": loss, "plain_loss": plain_loss}

    def rows_of(length: int) -> list[tuple[list[int], int]]:
        return [(list(islice(cycle(text), length)), 0)] * args.batch_size

    def floor(length: int) -> int:
        own = replace(args, max_seq_length=length, grad_checkpoint=False)
        return estimate_memory(model, rows_of(length), own, **options).floor_bytes

    ways: list[Way] = []
    notes: list[str] = []
    for way in _ways(tokens, plain=not args.grad_checkpoint):
        try:
            with way.applied(model):
                length, predicted = _longest(floor, allowed, most)
        except CheckpointError as error:
            notes.append(f"{way.name}: {error}")
            continue
        ways.append(replace(way, max_seq_length=length, predicted_bytes=predicted))
        if length == most:
            break
    best = max(ways, key=lambda way: way.max_seq_length, default=None)
    if best is None or not best.max_seq_length:
        raise _too_small(allowed, ways)
    length, tried = best.max_seq_length, 0
    while True:
        own = replace(args, max_seq_length=length, grad_checkpoint=False)
        with (
            best.applied(model),
            training_step(model, optimizer, rows_of(length), own, loss=loss, plain_loss=plain_loss) as ready,
            Snapshot(ready.state, spill=True),
        ):
            batch = ready.make_batch(args.batch_size)
            mx.eval(batch)
            trial = run_step(ready.step, [batch], ready.state, allowed, state_first=True)
            extra = ready.notes
        tried += 1
        if trial.peak_bytes <= allowed:
            break
        notes.append(
            f"rows of {length:,} tokens held {format_bytes(trial.peak_bytes)}, measured: more than the budget, and "
            f"more than the {format_bytes(best.predicted_bytes)} that were predicted"
        )
        # As much as this step held beyond its prediction, a shorter one will hold as well.
        room = allowed - int(1.05 * (trial.peak_bytes - best.predicted_bytes))
        with best.applied(model):
            shorter, predicted = _longest(floor, room, length)
        if tried == _MOST_STEPS or not 0 < shorter < length:
            raise BudgetError(
                f"No row was found that a step can take within {format_bytes(allowed)}: {'; '.join(notes)}. Give a "
                "larger budget; arrays that the process holds besides the model count as well.",
                needed_bytes=trial.peak_bytes,
                budget_bytes=allowed,
            )
        length, best = shorter, replace(best, max_seq_length=shorter, predicted_bytes=predicted)
    return LongestSequence(
        max_seq_length=length,
        batch_size=args.batch_size,
        accumulation_steps=args.grad_accumulation_steps,
        way=best,
        peak_bytes=trial.peak_bytes,
        seconds=trial.seconds,
        budget_bytes=allowed,
        ways=tuple(ways),
        truncation=str(truncation(data, length)),
        notes=(*notes, *extra),
        _model=model,
    )


def _ways(tokens: int, *, plain: bool) -> list[Way]:
    """The ways to train, the cheapest first."""
    ways = [Way("checkpoint", True, None), Way("checkpoint and tile", True, tokens)]
    return [Way("plain", False, None), *ways] if plain else ways


def _longest(floor: Callable[[int], int], allowed: int, most: int) -> tuple[int, int]:
    """The longest row whose floor is within the budget, and that floor; zeros where there is none.

    Floors grow with the length, as a line or faster, so that a straight line between one that fits and one that does
    not errs to the short side.
    """
    over = floor(most)
    if over <= allowed:
        return most, over
    least, fits, needs = _rounded(0, most), _rounded(2 * _TILE + 1, most), 0
    while (needs := floor(fits)) > allowed:
        if fits == least:
            return 0, 0
        most, over, fits = fits, needs, _rounded(fits // 2, most)
    turn = 0
    while most - fits > max(_step(most), fits * _PRECISION):
        along = (allowed - needs) / max(1, over - needs)
        between = _rounded(fits + int((along if turn % 2 == 0 else 0.5) * (most - fits)), most)
        between = max(between, _rounded(fits + _step(most), most))
        turn += 1
        needed = floor(between)
        if needed <= allowed:
            fits, needs = between, needed
        else:
            most, over = between, needed
    return fits, needs


def _rounded(length: int, most: int) -> int:
    """A length that mlx-lm pads nothing to and that attention likes, within bounds."""
    return min(most, max(_PAD, (length - 1) // _step(length) * _step(length)) + 1)


def _step(length: int) -> int:
    return _TILE if length > _TILE else _PAD


def _too_small(allowed: int, ways: Sequence[Way]) -> BudgetError:
    looked = ", ".join(way.name for way in ways) or "none"
    return BudgetError(
        f"Not even a short row fits {format_bytes(allowed)} (ways looked at: {looked}). Give a larger budget, a "
        "smaller batch, or quantize the model.",
        budget_bytes=allowed,
    )
