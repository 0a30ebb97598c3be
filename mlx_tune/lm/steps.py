"""mlx-lm's training step as `step`, `make_batch` and `state`: what the searches of this library take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.graphs.tracing.recomputation import is_tracing
from mlx_tune.lm.adapters import integer_parameters
from mlx_tune.lm.losses.next_token import Loss, choose_loss
from mlx_tune.state import Snapshot, same_training

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.optimizers import Optimizer
    from mlx_lm.tuner.trainer import TrainingArgs

#: The tokens of a row, and where its loss begins.
Row = tuple[Sequence[int], int]


@dataclass(frozen=True)
class TrainingStep:
    """One step of mlx-lm's trainer, and what a search for its batch has to know.

    Attributes:
        step: `step(batch)` runs a step and returns the loss first, then the number of tokens, nothing evaluated.
            `step(batch, kept=kept)` adds to these gradients instead of those in `kept`.
        make_batch: `make_batch(n)` returns the longest batch that training with `batch_size=n` can meet: tokens
            `[n / ranks, length]` and, for each row, where its loss begins and ends, `[n / ranks, 2]`.
        state: Objects that a step changes: the model and the optimizer.
        length: Tokens in a row of that batch, padding included.
        max_batch: The largest batch that the data sets allow.
        multiple_of: Batches must divide by this: the number of ranks.
        kept: Gradients kept from earlier batches, zeros here; None without accumulation.
        accumulation_steps: Batches to an update of the optimizer. Where it is above 1, `step` is the one that holds
            most: the one that adds to gradients kept from before, and updates.
        loss: The loss in words: linear, plain and why, or that it was given.
        plain_step: The same step with mlx-lm's own loss, where `step` takes the linear one by itself; else None.
    """

    step: Callable[..., tuple[mx.array, mx.array]]
    make_batch: Callable[[int], tuple[mx.array, mx.array]]
    state: tuple[nn.Module, Optimizer]
    length: int
    max_batch: int
    multiple_of: int
    accumulation_steps: int
    kept: object = None
    loss: str = ""
    plain_step: Callable[..., tuple[mx.array, mx.array]] | None = None

    @property
    def losses(self) -> tuple[Callable[..., object], Callable[..., object] | None]:
        """The step and the one with the linear loss, for a search that chooses; one alone where there is no choice."""
        return (self.step, None) if self.plain_step is None else (self.plain_step, self.step)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the report of a search."""
        return self.notes_for(None)

    def notes_for(self, fit: object) -> tuple[str, ...]:
        """The same where the search had both losses to choose from."""
        text = self.loss if self.plain_step is None else choose_loss(self.state[0], fit=fit).text
        return (f"loss: {text}",)


@contextmanager
def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    train_set: object,
    args: TrainingArgs,
    *,
    valid_set: object = None,
    loss: Loss | None = None,
    plain_loss: bool = False,
    evaluate: bool = True,
) -> Iterator[TrainingStep]:
    """Make a model ready for training as mlx-lm trains, hand out its step, and put the model back as it was.

    A model that was loaded lazily stays on disk until the step runs.

    The step is compiled as `mlx_lm.tuner.trainer.train` compiles its own, and again whenever blocks have been
    checkpointed or unwrapped in the meantime: MLX keeps compiled graphs by the shapes of what goes in, so that an
    older one would go on running. Gradients are averaged over the ranks of `mlx.launch`.

    Args:
        model: The model, with its adapters, frozen as it will be trained.
        optimizer: The optimizer. Its state is made for the block if it has none.
        train_set: A data set for mlx-lm's trainer: one of those that `mlx_lm.tuner.datasets.load_local_dataset`
            returns, a `CacheDataset`, or any sequence of `(tokens, offset)`.
        args: mlx-lm's `TrainingArgs`; `max_seq_length` and `grad_accumulation_steps` are used.
        valid_set: As `train_set`. mlx-lm evaluates with the training batch, which therefore cannot be larger.
        loss: As mlx-lm's trainer takes it; by default its own, without holding the logits where the model can be split.
        plain_loss: Hold the logits, as mlx-lm does.
        evaluate: Make the kept gradients now. A step that is only going to be traced does without.

    Yields:
        The step.

    Raises:
        InvalidArgumentError: No row to train on, nothing to train in the model, or accumulation below 1.
    """
    accumulation = args.grad_accumulation_steps
    if accumulation < 1:
        raise InvalidArgumentError(f"grad_accumulation_steps={accumulation}: it must be at least 1.")
    check_trainable(model)
    import mlx.core as mx
    from mlx.utils import tree_map

    world = mx.distributed.init()
    rows = as_rows(train_set)
    max_batch = largest_batch(rows, None if valid_set is None else as_rows(valid_set), world.size())
    make_batch = longest_batches(rows, args.max_seq_length, world)
    chosen = choose_loss(model, loss, plain=plain_loss)
    plain = choose_loss(model, plain=True).function if chosen.linear else None
    with ExitStack() as undo:
        undo.enter_context(same_training(model))
        if not getattr(optimizer, "_initialized", True):
            undo.enter_context(Snapshot(optimizer))
            optimizer.init(model.trainable_parameters())
        model.train()
        kept = tree_map(mx.zeros_like, model.trainable_parameters()) if accumulation > 1 else None
        if evaluate:
            mx.eval(kept)  # only what exists counts for what a trial holds
        yield TrainingStep(
            step=_compiled_step(model, optimizer, chosen.function, accumulation, kept),
            make_batch=make_batch,
            state=(model, optimizer),
            length=make_batch.length,
            max_batch=max_batch,
            multiple_of=world.size(),
            accumulation_steps=accumulation,
            kept=kept,
            loss=chosen.text,
            plain_step=None if plain is None else _compiled_step(model, optimizer, plain, accumulation, kept),
        )


def check_trainable(model: nn.Module) -> None:
    """See that a model has something to train, and nothing that cannot be.

    Raises:
        InvalidArgumentError: No trainable parameters, or whole numbers among it, as in quantized layers that were
            unfrozen.
    """
    from mlx.utils import tree_flatten

    if not tree_flatten(model.trainable_parameters()):
        raise InvalidArgumentError("The model has nothing to train: add adapters, or unfreeze layers, first.")
    codes = integer_parameters(model)
    if codes:
        raise InvalidArgumentError(
            f"{len(codes)} trainable parameters are whole numbers, which have no gradient; the first is {codes[0]!r}. "
            "Quantized layers were unfrozen: call lm.add_adapters(model, 'full'), which leaves their codes frozen."
        )


def _compiled_step(
    model: nn.Module, optimizer: Optimizer, loss: Loss, accumulation: int, kept: object
) -> Callable[..., tuple[mx.array, mx.array]]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.nn.utils import average_gradients
    from mlx.utils import tree_map

    loss_and_gradients = nn.value_and_grad(model, loss)
    state = [model.state, optimizer.state, mx.random.state]

    def update(batch: Iterable[object], kept: object) -> tuple[mx.array, mx.array]:
        (value, tokens), gradients = loss_and_gradients(model, *batch)
        if kept is not None:
            gradients = tree_map(mx.add, gradients, kept)
        if not is_tracing():  # MLX cannot export communication; what it holds is a buffer of 32 MiB
            gradients = average_gradients(gradients)
        if accumulation > 1:
            gradients = tree_map(lambda g: g / accumulation, gradients)
        optimizer.update(model, gradients)
        return value, tokens

    compiled: dict[bool, tuple[tuple[type, ...], Callable[..., object]]] = {}

    def step(batch: object, *, kept: object = kept) -> tuple[mx.array, mx.array]:
        kinds = tuple(type(module) for module in model.modules())
        tracing = is_tracing()
        if compiled.get(tracing, ((), None))[0] != kinds:
            compiled[tracing] = kinds, partial(mx.compile, inputs=state, outputs=state)(partial(update))
        return cast(tuple[mx.array, mx.array], compiled[tracing][1](batch, kept))

    return step


def as_rows(dataset: Any) -> Sequence[Row]:
    """See a data set as mlx-lm's trainer does: rows of `(tokens, offset)`, made when they are first asked for.

    Args:
        dataset: A `CacheDataset`, one of mlx-lm's data sets, or any sequence of rows.

    Raises:
        InvalidArgumentError: The data set is empty.
    """
    from mlx_lm.tuner.datasets import CacheDataset

    if len(dataset) == 0:
        raise InvalidArgumentError("The data set has no rows.")
    rows: Sequence[Row] = (
        dataset if isinstance(dataset, CacheDataset) or not hasattr(dataset, "process") else CacheDataset(dataset)
    )
    return rows


def largest_batch(train_rows: Sized, valid_rows: Sized | None, ranks: int) -> int:
    """The largest batch that mlx-lm's trainer takes: no more than either data set has rows, for every rank as many.

    Raises:
        InvalidArgumentError: Fewer rows than ranks.
    """
    rows = len(train_rows) if valid_rows is None else min(len(train_rows), len(valid_rows))
    if rows < ranks:
        raise InvalidArgumentError(f"{rows} rows are too few for {ranks} ranks: each needs one for every batch.")
    return rows // ranks * ranks


class longest_batches:  # noqa: N801 - used as a function
    """`make_batch` over a data set: its longest rows, padded and cut as mlx-lm does.

    The batches are made by mlx-lm's own `iterate_batches` from a data set that has nothing but these rows.

    Args:
        rows: The rows from `as_rows`.
        max_length: mlx-lm's `max_seq_length`.
        world: The group of ranks; each gets its own share of the rows.

    Attributes:
        length: Tokens in a row of every batch, padding included.
    """

    def __init__(self, rows: Sequence[Row], max_length: int, world: mx.distributed.Group) -> None:
        """Find the longest rows; each row has to be tokenized for that, up to the first that fills `max_length`."""
        self._world = world
        self._max_length = max_length
        seen: list[tuple[list[int], int]] = []
        for i in range(len(rows)):
            tokens, offset = row_of(rows[i])
            seen.append((tokens[:max_length], min(offset, max_length)))
            if len(tokens) >= max_length:
                break  # no batch is longer
        seen.sort(key=lambda row: -len(row[0]))
        if not seen[0][0]:
            raise InvalidArgumentError("The longest row of the data set has no tokens.")
        self._rows = seen
        self.length = int(self(world.size())[0].shape[1])

    def __call__(self, n: int) -> tuple[mx.array, mx.array]:
        """The longest batch of n rows, all ranks together; rows repeat where fewer were looked at."""
        from mlx_lm.tuner.trainer import iterate_batches

        if n < 1 or n % self._world.size():
            raise InvalidArgumentError(
                f"A batch of {n} rows does not divide among {self._world.size()} ranks: give a positive multiple."
            )
        rows = [self._rows[i % len(self._rows)] for i in range(n)]
        # Longest last in mlx-lm's order as well: the sort there is stable and by length.
        batch: tuple[mx.array, mx.array] = next(iterate_batches(rows, n, self._max_length, comm_group=self._world))
        return batch


def row_of(row: Row | Sequence[int]) -> tuple[list[int], int]:
    """The tokens of a row and where its loss begins, in whichever of mlx-lm's two forms it comes."""
    if len(row) == 2 and isinstance(row[0], Sized):
        tokens, offset = cast(Row, row)
        return list(tokens), int(offset)
    return list(cast(Sequence[int], row)), 0
