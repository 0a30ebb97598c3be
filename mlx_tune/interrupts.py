"""Ctrl-C at the right moments: not while something is half put back, but in the middle of what takes long."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _HeldInterrupt:
    """The state of this process's handler while a Ctrl-C is held back."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.let_through = False
        self.waiting: tuple[Any, ...] | None = None

    def handle(self, *received: object) -> None:
        """Take a Ctrl-C: hand it on now, or keep it."""
        self.waiting = received
        if self.let_through:
            self.hand_on()

    def hand_on(self) -> None:
        """Give what waits to the handler that was there before, which commonly raises `KeyboardInterrupt`."""
        received, self.waiting = self.waiting, None
        if received is not None:
            self.before(*received)


_held: _HeldInterrupt | None = None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back while the block runs; it comes when the block ends, or inside `interruptible`.

    Only the main thread receives one; elsewhere this does nothing.

    Examples:
        >>> import signal
        >>> done = []
        >>> try:
        ...     with uninterrupted():
        ...         signal.raise_signal(signal.SIGINT)
        ...         done.append("all of it")
        ... except KeyboardInterrupt:
        ...     done.append("then the interrupt")
        >>> done
        ['all of it', 'then the interrupt']
    """
    global _held
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _held is not None:  # inside another block
        with _set(_held, let_through=False):
            yield
        return
    held = _HeldInterrupt(signal.getsignal(signal.SIGINT))
    if not callable(held.before):  # ignored, or the end of the process: nothing to hold back
        yield
        return
    try:
        signal.signal(signal.SIGINT, held.handle)
        _held = held
        yield
    finally:
        _held = None
        signal.signal(signal.SIGINT, held.before)
    held.hand_on()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a Ctrl-C through again inside `uninterrupted`, the one that waits first; elsewhere this does nothing.

    Examples:
        >>> import signal
        >>> done = []
        >>> try:
        ...     with uninterrupted():
        ...         signal.raise_signal(signal.SIGINT)
        ...         with interruptible():
        ...             done.append("not reached")
        ... except KeyboardInterrupt:
        ...     done.append("interrupted")
        >>> done
        ['interrupted']
    """
    if _held is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _set(_held, let_through=True):
        _held.hand_on()
        yield


@contextmanager
def _set(held: _HeldInterrupt, *, let_through: bool) -> Iterator[None]:
    before = held.let_through
    try:
        held.let_through = let_through
        yield
    finally:
        held.let_through = before
    if before:
        held.hand_on()
