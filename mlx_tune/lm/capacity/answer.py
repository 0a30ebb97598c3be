"""`lm.fits`: will a model fit, from its configuration, on a machine that need not be here."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_tune.devices import backend
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.garbage import no_collections
from mlx_tune.lm.adapters import FINE_TUNE_TYPES, OPTIMIZERS
from mlx_tune.lm.capacity.configuration import Config, read_configuration
from mlx_tune.lm.capacity.confirm import confirm_step, folder_of, load_packed
from mlx_tune.lm.capacity.depth import Course, DeepCourse
from mlx_tune.lm.capacity.growth import largest_foretold
from mlx_tune.lm.capacity.inference import generation_fit
from mlx_tune.lm.capacity.quantization import refuse_twice
from mlx_tune.lm.capacity.result import Confirmation, Fits, TrainingWay, chosen_way
from mlx_tune.lm.capacity.training import TrainedModel, Tuning, training_course
from mlx_tune.lm.capacity.unloaded import Unloaded, longest_context
from mlx_tune.lm.losses.next_token import choose_loss
from mlx_tune.machines.table import (
    NamedMachine,
    find_machine,
    given_budget,
    machine_of_memory,
    smallest_mac,
    this_machine,
)
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN
from mlx_tune.state import same_random_stream
from mlx_tune.units import format_bytes, whole_number

if TYPE_CHECKING:
    import mlx.nn as nn

#: mlx-lm pads rows to multiples of this.
_PAD = 32
#: The ways of training in the table: their name, if blocks are checkpointed, and if logits are held a few at a time.
_WAYS = (("plain", False, False), ("checkpointed", True, False), ("checkpointed, linear loss", True, True))
#: No batch and no row is looked for above these.
_MOST_ROWS, _MOST_TOKENS = 1 << 16, 1 << 20


def fits(
    model: str | os.PathLike[str] | Config,
    *,
    machine: str | NamedMachine | None = None,
    memory: str | int | None = None,
    budget: str | int | None = None,
    fine_tune_type: str = "lora",
    rank: int = 8,
    num_layers: int | None = None,
    optimizer: str = "adam",
    batch_size: int = 1,
    max_seq_length: int = 2048,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    context: int | None = None,
    generate_batch: int = 1,
    kv_bits: int | None = None,
    revision: str | None = None,
    confirm: bool = False,
) -> Fits:
    """Predict if a model can be fine-tuned on a machine, at which batch, and how long its rows may be.

    The model is built from its configuration: its arrays have shapes and are never evaluated. mlx-lm's own training
    step is traced on it. No weights are needed, and those of a hub name are not fetched.

    Args:
        model: A model's folder, a `config.json`, a hub name, or a dictionary with the configuration's entries.
        machine: A machine by its name, such as "M3 Max 64GB" or "RTX 4090"; this one where nothing is named.
        memory: The memory of a Mac instead, such as "64GB", of which macOS keeps a part.
        budget: Bytes that MLX may use, taken as they are, instead of what the machine gives.
        fine_tune_type: "lora", "dora" or "full".
        rank: Rank of the adapters.
        num_layers: Blocks that are trained, from the last; None for mlx-lm's 16, or all where there are fewer; -1 for
            all.
        optimizer: mlx-lm's name of the optimizer.
        batch_size: Rows of the step that is asked about.
        max_seq_length: Tokens of each.
        bits: Bits that the weights are quantized to first; None for as they are.
        group_size: Weights that share a scale; None for the mode's own.
        mode: mlx-lm's mode of quantization.
        context: Tokens of prompt and answer together, where generating is asked about as well.
        generate_batch: Rows that are generated at a time.
        kv_bits: Bits of keys and values; None for the model's own dtype.
        revision: The branch, tag or commit of a hub name.
        confirm: True to run one real step as well, in the way that the answer chose, on this machine and priced for it.
            The weights have to be here, in a folder or the hub's cache, and the step has to fit what is free.

    Returns:
        The answer; `str` of it is the sentence and the table.

    Raises:
        InvalidArgumentError: No configuration there, an architecture that mlx-lm does not know, a machine that is not
            in the table, weights that are quantized already, memory below the weights, or a number that cannot be
            meant; or `confirm` and no weights here. The text says which.
        BudgetError: `confirm`, and the step is predicted not to fit this machine.
        MlxTuneError: The hub does not give the configuration.

    Examples:
        ```python
        print(mt.lm.fits("Qwen/Qwen3-8B", machine="M3 Max 64GB", bits=4))
        ```
    """
    started = time.perf_counter()
    for name, value in (("batch_size", batch_size), ("rank", rank), ("generate_batch", generate_batch)):
        whole_number(value, name, least=1)
    whole_number(max_seq_length, "max_seq_length", least=2)
    if context is not None:
        whole_number(context, "context", least=2)
    _one_of("fine_tune_type", fine_tune_type, FINE_TUNE_TYPES)
    _one_of("optimizer", optimizer.lower(), tuple(OPTIMIZERS))
    where = _machine(machine, memory, budget)
    described = read_configuration(model, revision)
    folder = folder_of(described, model, revision) if confirm else None
    refuse_twice(described.config, bits)
    unloaded = Unloaded(described.config, bits, group_size, mode)
    with no_collections(), same_random_stream():
        trained = TrainedModel(unloaded, Tuning(fine_tune_type, num_layers, rank, optimizer))
        weights = trained.weights_bytes
        if weights > where.budget_bytes:
            raise InvalidArgumentError(_below_weights(described.name, bits, weights, where))
        longest = longest_context(described.config)
        ways, extrapolated = [], False
        chosen = choose_loss(trained.whole)
        for way, checkpoint, linear in _WAYS:
            if linear and not chosen.linear:
                continue
            row, from_shorter = _way(
                way, trained, where, batch_size, max_seq_length, longest, checkpoint=checkpoint, linear_loss=linear
            )
            ways.append(row)
            extrapolated |= from_shorter
        generation = None
        if context is not None:
            generation = generation_fit(
                unloaded,
                where.backend,
                where.budget_bytes,
                context=context,
                batch_size=generate_batch,
                kv_bits=kv_bits,
                longest=longest,
            )
        confirmation = None
        if folder is not None:
            confirmation = _confirmed(trained, folder, chosen_way(ways).way, batch_size, max_seq_length)
    notes = [] if chosen.linear else [f"The loss is {chosen.text}."]
    if max_seq_length > longest:
        notes.append(f"The configuration allows {longest:,} tokens in a row, fewer than were asked about.")
    return Fits(
        model=described.name,
        bits=bits,
        weights_bytes=weights,
        fine_tune_type=fine_tune_type,
        batch_size=batch_size,
        max_seq_length=max_seq_length,
        machine=where,
        rows=tuple(ways),
        extrapolated=extrapolated,
        seconds=time.perf_counter() - started,
        generation=generation,
        confirmation=confirmation,
        notes=tuple(notes),
    )


def _way(
    name: str,
    trained: TrainedModel,
    where: NamedMachine,
    batch_size: int,
    length: int,
    longest: int,
    *,
    checkpoint: bool,
    linear_loss: bool,
) -> tuple[TrainingWay, bool]:
    """One row of the table, and if shorter models were used for it."""
    tuning = trained.tuning

    def trace(repeats: Sequence[int], rows: int, tokens: int) -> Course:
        return training_course(
            trained.shorter(repeats),
            tuning,
            rows,
            tokens,
            backend=where.backend,
            checkpoint=checkpoint,
            linear_loss=linear_loss,
        )

    course = DeepCourse(trained.depths, trace, batch_size, length)
    room = int(where.budget_bytes / (1 + ESTIMATE_MARGIN))
    one = course(1, length)
    # So many times the size fit at the least, where memory grows in a straight line: a reading there needs no further.
    times = max(2, (room - one.start_bytes) // max(1, one.peak_bytes - one.start_bytes))
    batch = largest_foretold(lambda rows: course(rows, length).floor, room, (1, times), most=_MOST_ROWS)
    row = largest_foretold(
        lambda tokens: course(1, tokens).floor,
        room,
        (max(_PAD, length // 2), length, max(_PAD, times * length // _PAD * _PAD)),
        step=_PAD,
        most=min(longest, _MOST_TOKENS),
    )
    floor = course(batch_size, length).peak_bytes
    peak = ceil(floor * (1 + ESTIMATE_MARGIN))
    return TrainingWay(
        way=name,
        floor_bytes=floor,
        peak_bytes=peak,
        fits=peak <= where.budget_bytes,
        largest_batch=batch.size,
        longest_row=row.size,
        row_limited=row.limited,
    ), course.extrapolated


def _confirmed(trained: TrainedModel, folder: Path, way: str, rows: int, length: int) -> Confirmation:
    """One real step in a way of the table, beside what is predicted for this machine's backend."""
    checkpoint, linear_loss = next(flags for name, *flags in _WAYS if name == way)
    tuning = trained.tuning
    predicted = training_course(
        trained.whole, tuning, rows, length, backend=backend(), checkpoint=checkpoint, linear_loss=linear_loss
    ).peak_bytes

    def load(allowed: int) -> nn.Module:
        model = load_packed(folder, trained.unloaded, trained.weights_bytes, allowed)
        trained.add_adapters(model)
        return model

    return confirm_step(
        load,
        predicted,
        way,
        rows,
        length,
        optimizer=tuning.optimizer,
        checkpoint=checkpoint,
        linear_loss=linear_loss,
    )


def _machine(machine: str | NamedMachine | None, memory: str | int | None, budget: str | int | None) -> NamedMachine:
    if machine is not None and memory is not None:
        raise InvalidArgumentError(f"machine={machine!r} and memory={memory!r} both name a machine: give one of them.")
    if isinstance(machine, NamedMachine):
        found = machine
    elif machine is not None:
        found = find_machine(machine)
    else:
        found = this_machine() if memory is None else machine_of_memory(memory)
    return found if budget is None else given_budget(budget, found)


def _below_weights(name: str, bits: int | None, weights: int, where: NamedMachine) -> str:
    gb = smallest_mac(weights)
    larger = "no Mac of the table holds them" if gb is None else f"a Mac with {gb} GB holds them"
    fewer = "Quantize to fewer bits" if bits is None or bits > 2 else "Take a smaller model"
    return (
        f"The weights of {name} alone take {format_bytes(weights)}, and {where.name} gives "
        f"{format_bytes(where.budget_bytes)}. {fewer}, or take a larger machine: {larger}."
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidArgumentError(f"{name}={value!r}: it is one of {', '.join(allowed)}.")
