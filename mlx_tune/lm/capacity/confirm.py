"""One real step of a model whose weights are here, beside its prediction; the two are never mixed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_tune.devices import backend
from mlx_tune.errors import BudgetError, InvalidArgumentError, MlxTuneError
from mlx_tune.lm.capacity.configuration import Described
from mlx_tune.lm.capacity.quantization import quantize_unloaded
from mlx_tune.lm.capacity.result import Confirmation
from mlx_tune.lm.capacity.unloaded import Unloaded
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN
from mlx_tune.memory import memory_budget
from mlx_tune.trees import arrays_of, nbytes_of
from mlx_tune.units import format_bytes

if TYPE_CHECKING:
    import mlx.nn as nn

#: The tokens of the step's rows are below this: every model has so many.
_TOKENS = 64


def folder_of(described: Described, model: object, revision: str | None) -> Path:
    """The folder with a model's weights; nothing is fetched.

    Args:
        described: The model.
        model: As it was named.
        revision: The branch, tag or commit of a hub name.

    Raises:
        InvalidArgumentError: The weights are not here.
    """
    if described.folder is not None:
        return described.folder
    text = str(model)
    if not isinstance(model, dict) and not Path(text).exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            cached = Path(snapshot_download(text, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            cached = None
        if cached is not None and any(cached.glob("model*.safetensors")):
            return cached
    raise InvalidArgumentError(
        f"confirm: the weights of {described.name} are not here, and a real step needs them. Name a folder that holds "
        "model*.safetensors, fetch a hub name with `hf download` first, or leave confirm out: answers need no weights."
    )


def confirm_step(
    load: Callable[[int], nn.Module],
    predicted: int,
    way: str,
    rows: int,
    length: int,
    *,
    optimizer: str,
    checkpoint: bool,
    linear_loss: bool,
) -> Confirmation:
    """Run one real step, and say what was predicted of it.

    Args:
        load: The model ready for training, its weights read, given the bytes that may be used.
        predicted: The floor of the step on this machine's backend.
        way: The name of the way of training.
        rows: Rows of the batch.
        length: Tokens of each.
        optimizer: mlx-lm's name of the optimizer.
        checkpoint: True where every block is checkpointed.
        linear_loss: True where the loss is taken from hidden states.

    Raises:
        BudgetError: It is predicted not to fit what is free on this machine.
        MlxTuneError: mlx-lm cannot load the weights.
    """
    import mlx.core as mx
    from mlx_lm.tuner.trainer import TrainingArgs

    from mlx_tune.checkpointing.blocks import checkpoint_blocks
    from mlx_tune.lm.adapters import make_optimizer
    from mlx_tune.lm.preparation import StandInRows
    from mlx_tune.lm.steps import training_step
    from mlx_tune.measuring.step import run_step

    limit, allowed = int(predicted * (1 + ESTIMATE_MARGIN)), memory_budget().bytes
    if limit > allowed:
        raise BudgetError(
            f"confirm: {way}, batch {rows} at {length:,} tokens is predicted to need {format_bytes(limit)}, and "
            f"{format_bytes(allowed)} are free for it on this machine. No step was run. Ask about a smaller batch or "
            "shorter rows, or confirm on a larger machine.",
            needed_bytes=limit,
            budget_bytes=allowed,
        )
    model = load(allowed)
    for array in arrays_of(model):  # one at a time, so that what it is made of is gone before the next
        mx.eval(array)
    mx.clear_cache()
    with checkpoint_blocks(model) if checkpoint else nullcontext():
        args = TrainingArgs(batch_size=rows, max_seq_length=length)
        data = StandInRows(rows, length, _TOKENS)
        with training_step(
            model, make_optimizer(optimizer), data, args, plain_loss=not linear_loss, evaluate=False
        ) as ready:
            batch = ready.make_batch(rows)
            mx.eval(batch, ready.state[0].state, ready.state[1].state)
            held = mx.get_active_memory() - nbytes_of((batch, ready.state))
            trial = run_step(ready.step, [batch], ready.state, limit + held, state_first=True)
    return Confirmation(way, backend(), predicted, trial.peak_bytes - held, limit, trial.seconds)


def load_packed(folder: Path, unloaded: Unloaded, weights_bytes: int, allowed: int) -> nn.Module:
    """Load a model lazily, and pack its weights as was asked.

    Args:
        folder: Where its weights are.
        unloaded: The model as its configuration says.
        weights_bytes: Its weights, packed.
        allowed: Bytes that may be used.

    Raises:
        BudgetError: Packing takes more.
        MlxTuneError: mlx-lm cannot load the weights.
    """
    from mlx_lm.utils import load_model

    try:
        model: nn.Module
        model, config = load_model(folder, lazy=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise MlxTuneError(f"mlx-lm cannot load {str(folder)!r}: {type(error).__name__}: {error}") from error
    if unloaded.bits is not None:
        # Each array is there unpacked for a moment, and once more while it is packed.
        largest = max(array.nbytes for array in arrays_of(model))
        if weights_bytes + 2 * largest > allowed:
            raise BudgetError(
                f"confirm: packing the weights needs {format_bytes(weights_bytes + 2 * largest)}, and "
                f"{format_bytes(allowed)} are free for it on this machine. Quantize to a folder first "
                "(`mlx-tune quantize`), and confirm with that.",
                needed_bytes=weights_bytes + 2 * largest,
                budget_bytes=allowed,
            )
        quantize_unloaded(model, config, unloaded.bits, unloaded.group_size, unloaded.mode)
    return model
