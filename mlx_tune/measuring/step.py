"""One training step run for real and measured: what the search for a limit and the checkpoint plan stand on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from mlx_tune.errors import TrialError
from mlx_tune.interrupts import interruptible
from mlx_tune.memory import memory_limit, track_memory
from mlx_tune.trees import arrays_of


@dataclass(frozen=True)
class StepTrial:
    """A measured step.

    Attributes:
        limit_bytes: The memory limit it ran under; None for the one that was set already.
        peak_bytes: The most that arrays held at once.
        seconds: Wall time.
    """

    limit_bytes: int | None
    peak_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def run_step(
    step: Callable[..., Any], args: Sequence[Any], state: Any = (), limit_bytes: int | None = None
) -> StepTrial:
    """Run one step, evaluate what it returns and what it changed, and measure both.

    Args:
        step: Called with `args`; returns arrays.
        args: Evaluated arrays, in any nesting.
        state: Objects that the step changes; evaluated together with the outputs, as a training loop does.
        limit_bytes: The memory limit to run it under; None leaves the one that is set.

    Returns:
        Its peak and its time.

    Raises:
        TrialError: The step returned no array.

    Examples:
        >>> import mlx.core as mx
        >>> trial = run_step(lambda x: (x @ x).sum(), [mx.ones((256, 256))])
        >>> trial.peak_bytes > 256 * 256 * 4
        True
    """
    import mlx.core as mx

    gc.collect()  # arrays in cycles of an earlier step would count towards this one's peak
    limit = memory_limit(limit_bytes) if limit_bytes is not None else nullcontext()
    with limit, track_memory() as memory, interruptible():
        outputs = list(arrays_of(step(*args)))
        if not outputs:
            raise TrialError("The step returned no array, so nothing was measured: return the loss.")
        mx.eval(outputs, list(arrays_of(state)))
        del outputs
    return StepTrial(limit_bytes, memory.peak_bytes, memory.seconds)
