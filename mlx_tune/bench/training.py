"""Measuring training steps: floors and peaks, the curve of the limit, and a search for the batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_tune import devices
from mlx_tune.batching.autobatch import autobatch
from mlx_tune.bench.sizes import Sizes, require
from mlx_tune.checkpointing.blocks import checkpoint_blocks
from mlx_tune.checkpointing.verify import verify_checkpoint
from mlx_tune.graphs.estimate import MemoryEstimate, estimate_memory
from mlx_tune.measuring.step import run_step
from mlx_tune.measuring.step_floor import StepFloor
from mlx_tune.measuring.tightest_limit import tightest_limit
from mlx_tune.presentation.plain import Json
from mlx_tune.trees import arrays_of, nbytes_of

#: A place between the floors of two batches, clear of the noise of both.
_BETWEEN = 0.4
#: Shares of the way from the floor to the free peak at which limits are set.
_CURVE = (0.0, 0.25, 0.5, 0.75)


class LanguageModel(nn.Module):
    """A decoder out of MLX's own blocks."""

    def __init__(self, sizes: Sizes) -> None:
        """Make it with random weights."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.encoder = nn.TransformerEncoder(sizes.blocks, sizes.width, sizes.heads)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits `[batch, length, vocabulary]` of tokens `[batch, length]`."""
        hidden = self.embedding(tokens)
        mask = nn.MultiHeadAttention.create_additive_causal_mask(tokens.shape[1], hidden.dtype)
        logits: mx.array = self.head(self.encoder(hidden, mask))
        return logits


@dataclass
class Job:
    """A model in training.

    Attributes:
        model: The model.
        optimizer: AdamW.
        loss: The loss of a model on tokens `[batch, length]`.
        step: One training step on tokens; returns the loss.
        make_batch: Tokens of so many rows.
    """

    model: nn.Module
    optimizer: optim.Optimizer
    loss: Callable[[mx.array], mx.array]
    step: Callable[[mx.array], mx.array]
    make_batch: Callable[[int], mx.array]

    @property
    def state(self) -> tuple[nn.Module, optim.Optimizer]:
        """The objects that the step changes."""
        return self.model, self.optimizer


def make_job(sizes: Sizes) -> Job:
    """A language model in the dtype that people train in here: bfloat16 on a GPU, float32 on a processor.

    Nothing of it is evaluated: `settle` does that, once it is clear that the step fits.
    """
    mx.random.seed(0)
    model: nn.Module = LanguageModel(sizes)
    if devices.backend() != "cpu":
        model.set_dtype(mx.bfloat16)
    optimizer = optim.AdamW(1e-4)
    optimizer.init(model.trainable_parameters())

    def loss(tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    loss_and_gradients = nn.value_and_grad(model, loss)

    def step(tokens: mx.array) -> mx.array:
        value: mx.array
        value, gradients = loss_and_gradients(tokens)
        optimizer.update(model, gradients)
        return value

    def make_batch(n: int) -> mx.array:
        return mx.random.randint(0, sizes.vocabulary, (n, sizes.tokens + 1), key=mx.random.key(n))

    return Job(model, optimizer, loss, step, make_batch)


def settle(job: Job, rows: int, room: int) -> tuple[mx.array, MemoryEstimate]:
    """Make the job's weights and a batch, if a step on it is predicted to fit.

    Args:
        job: The job.
        rows: Of the batch.
        room: The bytes that a step may take.

    Returns:
        The batch, and what was predicted.

    Raises:
        LeftOutError: The step does not fit; nothing was evaluated.
    """
    batch = job.make_batch(rows)
    estimate = estimate_memory(job.step, batch, state=job.state)
    require(estimate.peak_bytes, room)
    for array in arrays_of((job.model.parameters(), job.optimizer.state)):
        mx.eval(array)  # one by one: the float32 values that they are cast from are freed in between
    mx.eval(batch)
    return batch, estimate


def floors(sizes: Sizes, room: int) -> dict[str, Json]:
    """Predicted floors and peaks beside measured ones, of a plain and a checkpointed step.

    Args:
        sizes: Of the model and its batch.
        room: The bytes that it may take.
    """
    found: dict[str, Json] = {}
    for name in ("plain", "checkpointed"):
        job = make_job(sizes)
        with _checkpointed(job, name == "checkpointed"):
            batch, estimate = settle(job, sizes.rows, room)
            run_step(job.step, [batch], job.state, 1)  # kernels are made, and the optimizer's state is as it stays
            held_back = _peaks(job, batch, sizes.turns, 1)
            free = _peaks(job, batch, sizes.turns, None)
        found[name] = {
            "predicted_floor_bytes": estimate.floor_bytes,
            "floor_bytes": min(held_back),
            "predicted_peak_bytes": estimate.peak_bytes,
            "peak_bytes": max(free),
        }
    return found


def limits(sizes: Sizes, room: int) -> dict[str, Json]:
    """Peaks and times of a checkpointed step under limits, and the limit that `tightest_limit` chooses.

    Args:
        sizes: Of the model and its batch.
        room: The bytes that it may take.
    """
    job = make_job(sizes)
    with _checkpointed(job, True):
        batch, estimate = settle(job, sizes.rows, room)
        best = tightest_limit(job.step, batch, state=job.state, progress=False)
        floor, free = estimate.floor_bytes, best.free_peak_bytes
        curve: list[Json] = []
        for share in _CURVE:
            limit = int(floor + share * max(0, free - floor))
            trials = [run_step(job.step, [batch], job.state, limit) for _ in range(sizes.turns)]
            figures = {"peak_bytes": min(t.peak_bytes for t in trials), "seconds": min(t.seconds for t in trials)}
            curve.append({"limit_bytes": limit, **figures})
        held_back = min(_peaks(job, batch, sizes.turns, 1))
    chosen = next((trial for trial in best.trials if trial.limit_bytes == best.limit_bytes), None)
    return {
        "free_peak_bytes": free,
        "free_seconds": best.free_seconds,
        "held_back_peak_bytes": held_back,
        "curve": curve,
        "tightest": {
            "limit_bytes": best.limit_bytes,
            "peak_bytes": best.peak_bytes,
            "seconds": best.seconds,
            "slowdown": chosen.slowdown if chosen else 0.0,
            "uncertainty": chosen.uncertainty if chosen else 0.0,
        },
    }


def gradients(sizes: Sizes, room: int) -> dict[str, Json]:
    """The largest difference between checkpointed and plain gradients, and whether that is noise.

    Args:
        sizes: Of the model and its batch.
        room: The bytes that it may take.
    """
    job = make_job(sizes)
    # Gradients of three runs are compared, and those of one are in a step already.
    batch, _ = settle(job, sizes.rows, room - 2 * nbytes_of(job.model.trainable_parameters()))
    report = verify_checkpoint(job.model, job.loss, batch)
    return {
        "equal": report.ok,
        "parameters": len(report.parameters),
        "largest_difference": max(p.difference for p in report.parameters),
    }


def search(sizes: Sizes, room: int) -> dict[str, Json]:
    """The trials of `autobatch` under a budget for some rows, and the peak of training at its answer.

    Args:
        sizes: Of the model.
        room: The bytes that it may take.
    """
    job = make_job(sizes)
    settle(job, 1, room)
    floor = StepFloor(job.step, job.make_batch, job.state)
    below, above = (floor(rows).bytes for rows in (sizes.budget_rows, sizes.budget_rows + 1))
    budget = int(below + _BETWEEN * (above - below))
    require(budget, room)
    found = autobatch(job.step, job.make_batch, budget=budget, state=job.state, progress=False)
    batch = job.make_batch(found.batch_size)
    with found.applied():
        trained = max(_peaks(job, batch, sizes.turns, None))
    return {
        "budget_bytes": budget,
        "rows_by_floor": sizes.budget_rows,
        "batch_size": found.batch_size,
        "trial_peaks_bytes": [trial.peak_bytes for trial in found.trials],
        "trained_peak_bytes": trained,
        "steps_of_the_answer": found.repeated_seconds / found.seconds,
        "search_seconds": found.search_seconds,
    }


def _peaks(job: Job, batch: mx.array, turns: int, limit: int | None) -> list[int]:
    return [run_step(job.step, [batch], job.state, limit).peak_bytes for _ in range(turns)]


def _checkpointed(job: Job, really: bool) -> AbstractContextManager[object]:
    return checkpoint_blocks(job.model) if really else nullcontext()
