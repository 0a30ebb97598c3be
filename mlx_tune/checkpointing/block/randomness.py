"""This thread's stream of random numbers, so that a block can be run again with the draws it had.

`mx.random.*` called without a key splits one from a stream that MLX keeps for each thread. A block that is run
twice therefore draws twice, and differently. Setting the stream back to the key it had gives the same draws
again, for every way of drawing there is, and no other thread sees anything of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_tune import upstream


class _End:
    """Goes with its thread, and takes MLX's stream of that thread along."""

    def __del__(self) -> None:
        """Runs on the thread itself, the last thing that Python does there."""
        mx.clear_streams()


_ends = threading.local()


def _end_with_thread() -> None:
    """Have MLX let go of this thread's stream while Python still runs on it.

    MLX lets go of it later, when the thread of the system ends, and needs Python's lock for that: where the process
    is about to exit by then, it aborts ("terminate called without an active exception"). The streams and traces that
    go with it are of no use to other threads, and would go a moment later.
    """
    thread = threading.current_thread()
    # Threads that Python did not start may come back; that of the main program ends with it.
    if thread is not threading.main_thread() and type(thread).__name__ != "_DummyThread" and not hasattr(_ends, "end"):
        _ends.end = _End()


def thread_stream() -> list[mx.array]:
    """The list of one key that MLX's draws on this thread split from, itself and not a copy.

    Returns:
        The list; putting another uint32 key of shape [2] into it moves the stream.

    Raises:
        BackendError: This version of MLX keeps its stream in some other way.

    Examples:
        >>> import mlx.core as mx
        >>> stream = thread_stream()
        >>> mx.random.seed(3)
        >>> stream[0].tolist()
        [0, 3]
    """
    _end_with_thread()
    return upstream.random_stream()


@contextmanager
def draws_from(key: mx.array) -> Iterator[None]:
    """Let draws on this thread split from `key` for a while, then go on with the stream as it was.

    Args:
        key: A key as `mx.random.key` makes it, uint32 of shape [2]; may be a tracer.

    Examples:
        >>> import mlx.core as mx
        >>> key = mx.random.key(0)
        >>> with draws_from(key):
        ...     first = mx.random.uniform().item()
        >>> with draws_from(key):
        ...     second = mx.random.uniform().item()
        >>> first == second
        True
    """
    stream = thread_stream()
    before = stream[0]
    stream[0] = key
    try:
        yield
    finally:
        stream[0] = before
