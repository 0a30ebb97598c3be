"""Do the numbers still hold at this size? The same rows must give the same loss at batch 1 and at batch n."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlx_tune.batching.probe import MakeBatch, Step
from mlx_tune.errors import TrialError
from mlx_tune.interrupts import interruptible
from mlx_tune.memory import memory_limit
from mlx_tune.trees import arrays_of, walk
from mlx_tune.units import number

if TYPE_CHECKING:
    import mlx.nn as nn

#: Losses of the same rows may differ by this share: sums are taken in another order, and half precision rounds.
_SAME = 0.02


def check_loss(
    step: Step,
    make_batch: MakeBatch,
    state: object,
    size: int,
    limit_bytes: int,
    restore: Callable[[], None],
) -> str | None:
    """Compare the loss of one row with that of the row `size` times over, from the same weights, dropout off.

    Some versions of MLX report an allocation that failed on Metal by nothing but zeros (mlx#3979, mlx#4134).

    Args:
        step: Runs a step, returns the loss first.
        make_batch: Makes a batch of n rows.
        state: Objects that the step updates.
        size: The batch size in question.
        limit_bytes: The memory limit to run under.
        restore: Puts the state back.

    Returns:
        The fault, or None.

    Raises:
        TrialError: The check cannot be made: the arrays of a batch do not begin with the rows, or the loss is random.
    """
    with _dropout_off(state):
        row = make_batch(1)
        alone = _loss(step, row, state, limit_bytes, restore)
        again = _loss(step, row, state, limit_bytes, restore, move_stream=True)
        if abs(again - alone) > 1e-6 * abs(alone):
            raise TrialError(
                "canary=True needs a loss that the weights and rows decide, but this one differs from run to run "
                "even in evaluation mode: a compiled step keeps the dropout that it was compiled with. Pass the "
                "step without mx.compile, or canary=False."
            )
        many = _loss(step, _repeat(row, size), state, limit_bytes, restore)
    for expected in (alone, alone * size):  # a mean over rows, or a sum
        if abs(many - expected) <= _SAME * abs(expected):
            return None
    return f"the canary's loss is {many:.6g} at this size and {alone:.6g} at batch 1, for the same rows"


def _loss(
    step: Step,
    batch: object,
    state: object,
    limit_bytes: int,
    restore: Callable[[], None],
    *,
    move_stream: bool = False,
) -> float:
    import mlx.core as mx

    from mlx_tune.upstream import set_mode

    training = _modules(state)
    modes = [module.training for module in training]
    restore()
    if move_stream:  # what is drawn at random comes out otherwise than the first time
        mx.eval(mx.random.uniform())
    for module, mode in zip(training, modes, strict=True):
        set_mode(module, mode)  # restoring puts the training flag back, too
    with memory_limit(limit_bytes), interruptible():
        out = step(batch)
        arrays = list(arrays_of(out))
        mx.eval(arrays, list(arrays_of(state)))
    return number(arrays[0].astype(mx.float32).mean())


def _repeat(row: object, size: int) -> object:
    import mlx.core as mx

    from mlx_tune.graphs.arguments import argument_arrays, with_arrays

    def repeated(array: mx.array) -> mx.array:
        if array.ndim == 0 or array.shape[0] != 1:
            raise TrialError(
                f"canary=True repeats the row of make_batch(1), but one of its arrays has shape {list(array.shape)} "
                f"and does not begin with an axis of one row. Pass canary=False."
            )
        return mx.repeat(array, size, axis=0)

    return with_arrays(row, map(repeated, argument_arrays(row)))


def _modules(state: object) -> list[nn.Module]:
    import mlx.nn as nn

    return [node for node in walk(state) if isinstance(node, nn.Module)]


@contextmanager
def _dropout_off(state: object) -> Iterator[None]:
    """Evaluation mode while the block runs, and every module's own mode afterwards."""
    from mlx_tune.upstream import set_mode

    modules = _modules(state)
    modes = [module.training for module in modules]
    for module in modules:
        set_mode(module, False)
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            set_mode(module, mode)
