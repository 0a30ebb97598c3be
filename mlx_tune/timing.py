"""One training step run for real and measured: what the search for a limit and the checkpoint plan stand on."""

from __future__ import annotations

import gc
import math
import statistics
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


@dataclass(frozen=True)
class Comparison:
    """Two ways of doing the same, timed in turns.

    Attributes:
        ratio: Time of the second over that of the first; the median over the turns.
        uncertainty: The standard error of the ratio, relative; infinite after a single turn.
        turns: The number that were run.
    """

    ratio: float
    uncertainty: float
    turns: int


def compare(
    first: Callable[[], float], second: Callable[[], float], *, threshold: float, most_turns: int = 6
) -> Comparison:
    """Time two ways in turns until it is clear on which side of a threshold their ratio lies.

    Turns take away what changes slowly: other processes, the clock of a warm machine. The order within a turn
    alternates, so that neither way always runs after the other.

    Args:
        first: Runs the one way once and returns its seconds.
        second: The same for the other.
        threshold: The ratio in question.
        most_turns: After so many turns the median decides, however unclear.

    Returns:
        The ratio and how sure it is.

    Examples:
        >>> compare(lambda: 1.0, lambda: 1.5, threshold=1.02).ratio
        1.5
    """
    logs: list[float] = []
    while True:
        if len(logs) % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        logs.append(math.log(b / a))
        middle = statistics.median(logs)
        # 1.253 is how much wider the median of a normal sample scatters than its mean.
        error = 1.253 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
        clear = len(logs) > 2 and abs(middle - math.log(threshold)) > 2 * error
        if clear or len(logs) >= most_turns:
            return Comparison(math.exp(middle), error, len(logs))
