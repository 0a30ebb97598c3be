"""What the sections of gpu.py share: one measured training step, and tables that show their rows at once."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import gpu_models
import mlx.core as mx
import mlx.nn as nn

import mlx_tune as mt

GB = 10**9

#: Rows of so many tokens are trained on; one more is read, as the last one's answer.
TOKENS = {"tiny": 64, "1B": 1024, "8B": 1024}


def note(row: list[Any]) -> list[Any]:
    """Show a row at once, so that a run that is cut short still says what it found."""
    print("  ...", *row, flush=True)
    return row


def release() -> None:
    """Give back what earlier measurements held."""
    gc.collect()
    mx.clear_cache()


def training(size: str, **options: Any) -> gpu_models.Training:
    """A model in training, on rows of the length that goes with its size unless another is given."""
    return gpu_models.training(size, **({"length": TOKENS[size] + 1} | options))


def measured(job: gpu_models.Training, batch: mx.array, *, limit: int | None = None, runs: int = 4) -> dict[str, Any]:
    """Peak and seconds of a step after one that compiles: the smallest peak, the median time."""
    peaks, times = [], []
    with mt.memory_limit(limit) if limit is not None else nullcontext():
        for run in range(runs + 1):
            release()
            with mt.track_memory() as m:
                mx.eval(job.step(batch), job.model.state, job.optimizer.state)
            if run:
                peaks.append(m.peak_bytes)
                times.append(m.seconds)
    return {"peak_bytes": min(peaks), "seconds": statistics.median(times), "limit_bytes": limit}


@contextmanager
def mlx_lm_checkpointing(model: nn.Module) -> Iterator[None]:
    """mlx-lm's own way, taken back afterwards (it patches the class and never does)."""
    from mlx_lm.tuner.trainer import grad_checkpoint

    kind = type(model.layers[0])
    before = kind.__call__
    grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        kind.__call__ = before
