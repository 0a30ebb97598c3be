"""One training step run for real and measured: what every search, plan and comparison stands on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_tune.errors import TrialError
from mlx_tune.interrupts import interruptible
from mlx_tune.memory import held_limits, track_memory
from mlx_tune.trees import arrays_of

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_tune.presentation.plain import Json


@dataclass(frozen=True)
class StepTrial:
    """A measured step.

    Attributes:
        limit_bytes: The memory limit it ran under; None for the one that was set already.
        peak_bytes: The most that arrays held at once.
        seconds: Wall time.
        base_bytes: The memory that was held before it.
        fault: The fault of its loss, in words, where somebody judged it and found one.
    """

    limit_bytes: int | None
    peak_bytes: int
    seconds: float
    base_bytes: int = field(default=0, compare=False)
    fault: str | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Json]:
        """The limit, the peak and the time, ready for JSON."""
        return {"limit_bytes": self.limit_bytes, "peak_bytes": self.peak_bytes, "seconds": self.seconds}


def run_step(
    step: Callable[..., object],
    args: Sequence[object],
    state: object = (),
    limit_bytes: int | None = None,
    *,
    cache_limit_bytes: int | None = None,
    judge: Callable[[mx.array], str | None] | None = None,
    state_first: bool = False,
) -> StepTrial:
    """Run one step, evaluate what it returns and what it changed, and measure both.

    Args:
        step: Called with `args`; returns arrays, the loss first.
        args: Evaluated arrays, in any nesting.
        state: Objects that the step changes; evaluated together with the outputs, as a training loop does.
        limit_bytes: The memory limit to run it under; None leaves the one that is set.
        cache_limit_bytes: The same for buffers that are kept for reuse.
        judge: Looks at the loss once everything is measured, and says what is wrong with it, or None.
        state_first: Evaluate the state before the outputs, as mlx-lm's trainer does.

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
    before = mx.get_active_memory()
    with held_limits(limit_bytes, cache_limit_bytes), track_memory() as memory, interruptible():
        result = step(*args)
        outputs = list(arrays_of(result))
        if not outputs:
            described = "None" if result is None else f"a {type(result).__name__} without arrays"
            raise TrialError(
                f"step returned {described}: it must return arrays, the loss first, so that what it computes is "
                f"evaluated and measured."
            )
        ends = [outputs, list(arrays_of(state))]
        mx.eval(*(reversed(ends) if state_first else ends))
        loss = outputs[0]
        del result, outputs, ends
    mx.eval(mx.zeros(1) + 1)  # on Metal, an error that was stored by the work above comes out here (mlx#4174)
    fault = judge(loss) if judge is not None else None
    return StepTrial(limit_bytes, memory.peak_bytes, memory.seconds, before, fault)
