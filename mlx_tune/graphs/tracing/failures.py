"""Saying what a step did that cannot be traced, and in which line of whose code."""

from __future__ import annotations

import os
import re
import traceback

from mlx_tune.errors import TraceError

#: The folder of `graphs`, whose lines are not the step's.
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def explain_failure(error: BaseException) -> TraceError | None:
    """Turn what went wrong during a trace into an error that names the place and the way out.

    Args:
        error: The exception.

    Returns:
        A `TraceError`, or None where the user's own exception says it best.
    """
    if isinstance(error, TraceError) or not isinstance(error, (ValueError, RuntimeError, MemoryError)):
        return None
    text = str(error)
    if "during function transformations" in text or "without a primitive" in text or "[async_eval]" in text:
        return TraceError(
            f"The step evaluates an array {_place(error)}. A step is planned without running it, so it must only build "
            "arrays: leave mx.eval, .item(), float(), print and `if` on arrays to the code that calls the step."
        )
    if isinstance(error, MemoryError):
        # What MLX's exporter raises for sums over several machines (AllReduce), whose group it cannot write down.
        return TraceError(
            "The step contains an operation that MLX cannot describe, such as a sum over several machines. Skip it "
            "while tracing (`if not mlx_tune.is_tracing(): gradients = nn.average_gradients(gradients)`), or "
            "measure instead: autobatch() and memory_limit() need no description."
        )
    if refused := refused_primitive(error):
        return TraceError(
            f"The step contains the operation {refused}, which MLX cannot describe and for which there is no "
            "stand-in yet. Write that part of the step with other operations, or measure instead: autobatch() and "
            "memory_limit() need no description."
        )
    return None


def refused_primitive(error: BaseException) -> str:
    """The primitive that the exporter says it cannot describe; empty for any other error."""
    match = re.search(r"Unable to get state for primitive (\w+)", str(error))
    return match[1] if match and isinstance(error, ValueError) else ""


def _place(error: BaseException) -> str:
    """The line that evaluated, and the line of the user's own code that led there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN)]
    if not frames:
        return "inside"
    deepest = frames[-1]
    where = f"at {deepest.filename}:{deepest.lineno} (`{(deepest.line or '').strip()}`)"
    own = [f for f in frames if "site-packages" not in f.filename]
    if own and own[-1] is not deepest:
        where += f", called from {own[-1].filename}:{own[-1].lineno} (`{(own[-1].line or '').strip()}`)"
    return where
