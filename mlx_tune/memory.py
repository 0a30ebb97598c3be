"""Counting, limiting and budgeting memory: `track_memory`, `memory_limit`, `memory_budget`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Self, SupportsIndex

from mlx_tune import devices
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.interrupts import uninterrupted
from mlx_tune.presentation.plain import Json
from mlx_tune.units import Budget, format_bytes, format_seconds, parse_bytes, parse_fraction

_lock = threading.RLock()

#: Called with every limit that `memory_limit` is about to set, before it does: what lives above says here when a
#: limit does not go well with it. (Wired memory and a tight limit do not, mlx#3186.)
limit_watchers: list[Callable[[int], None]] = []


class track_memory(ContextDecorator):  # noqa: N801 - used as a function
    """Measure what a block of code needs: peak, active and cached bytes, the process's footprint, seconds.

    `mx.reset_peak_memory` sets MLX's counter to zero for everybody. A tracker that is opened inside another
    therefore hands its peak on to the outer ones, so nesting changes no figure. Work that is queued when the
    block ends is waited for; arrays that nobody evaluated in it cost nothing, since MLX has not made them yet.

    MLX's peak leaves its buffer cache out, which the system charges to the process all the same: `cache_bytes`
    says how much it is (mlx-lm#986 saw 7 GB of peak in a process of 51 GB).

    Attributes:
        peak_bytes: The most that arrays held at once, what was there before included.
        active_bytes: The memory of arrays at the end.
        cache_bytes: The memory that MLX keeps for reuse at the end.
        footprint_bytes: The memory that the system charges the process with at the end.
        seconds: Wall time.

    While the block runs, all of them say what holds so far. The counters are the process's: work of other
    threads is counted too.

    Examples:
        >>> import mlx.core as mx
        >>> with track_memory() as m:
        ...     mx.eval(mx.zeros((1000, 250)))
        >>> m.peak_bytes >= 1_000_000
        True
    """

    _open: list[track_memory] = []

    def __init__(self) -> None:
        """Start nothing yet: the `with` does."""
        self._peak = 0
        self._started = 0.0
        self._final: tuple[int, int, int, int, float] | None = None

    def _recreate_cm(self) -> Self:
        """A fresh tracker for every call of a decorated function."""
        return type(self)()

    def __enter__(self) -> Self:
        """Wait for work that was queued before, and start counting."""
        import mlx.core as mx

        mx.synchronize()
        with _lock:
            _hand_on_peak()
            self._final, self._peak = None, mx.get_active_memory()
            track_memory._open.append(self)
            self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for queued work, fix the figures and hand the peak on; the block's own exception goes first."""
        import mlx.core as mx

        try:
            mx.synchronize()
        except Exception:
            if error is None:
                raise  # with an exception on its way already, that one tells more
        finally:
            seconds = time.perf_counter() - self._started
            with _lock:
                _hand_on_peak()
                track_memory._open.remove(self)
                active = mx.get_active_memory()
                self._final = (
                    max(self._peak, active),
                    active,
                    mx.get_cache_memory(),
                    devices.footprint_bytes(),
                    seconds,
                )

    @property
    def peak_bytes(self) -> int:
        """The most that arrays held at once, in bytes."""
        if self._final is not None:
            return self._final[0]
        import mlx.core as mx

        return max(self._peak, mx.get_peak_memory(), mx.get_active_memory())

    @property
    def active_bytes(self) -> int:
        """The memory of arrays, in bytes."""
        if self._final is not None:
            return self._final[1]
        import mlx.core as mx

        return mx.get_active_memory()

    @property
    def cache_bytes(self) -> int:
        """The memory that MLX keeps for reuse, in bytes."""
        if self._final is not None:
            return self._final[2]
        import mlx.core as mx

        return mx.get_cache_memory()

    @property
    def footprint_bytes(self) -> int:
        """The memory that the system charges the process with, in bytes."""
        return self._final[3] if self._final is not None else devices.footprint_bytes()

    @property
    def seconds(self) -> float:
        """Wall time of the block."""
        return self._final[4] if self._final is not None else time.perf_counter() - self._started

    def __str__(self) -> str:
        """One line."""
        return (
            f"peak {format_bytes(self.peak_bytes)}, active {format_bytes(self.active_bytes)}, "
            f"cache {format_bytes(self.cache_bytes)}, process {format_bytes(self.footprint_bytes)}, "
            f"{format_seconds(self.seconds)}"
        )

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        names = ("peak_bytes", "active_bytes", "cache_bytes", "footprint_bytes", "seconds")
        return {name: getattr(self, name) for name in names}


def _hand_on_peak() -> None:
    """Give the counter's peak to every open tracker, then start it anew. Call with the lock held."""
    import mlx.core as mx

    peak = mx.get_peak_memory()
    for tracker in track_memory._open:
        tracker._peak = max(tracker._peak, peak)
    mx.reset_peak_memory()


class memory_limit(ContextDecorator):  # noqa: N801 - used as a function
    """Set MLX's memory limit for a block of code, and put back what was there.

    The limit is no cap. While more is active than it says, `eval` waits for running work before it queues more,
    so memory that running ahead would have taken is not taken. The peak still overshoots the limit by a few per
    cent, since MLX looks after it has allocated (transforms.cpp), and a limit below what the step needs only
    slows it down. On Metal the limit also lowers the size at which cached buffers are released.

    Limits nest: the innermost block that is still open decides. Blocks may end in any order, in any thread; the
    limit that was there before the first of them returns with the last.

    Args:
        limit: Bytes, or text such as "20GB".

    Raises:
        InvalidArgumentError: Not a number of bytes.

    Attributes:
        limit_bytes: The limit that this block asks for.

    Examples:
        >>> with memory_limit("20GB") as limit:
        ...     limit.limit_bytes
        20000000000
    """

    _open: list[memory_limit] = []
    _baseline = 0

    def __init__(self, limit: str | SupportsIndex) -> None:
        """Read the limit; nothing is set yet."""
        self.limit_bytes = parse_bytes(limit)

    def _recreate_cm(self) -> Self:
        """A block of its own for every call of a decorated function."""
        return type(self)(self.limit_bytes)

    def __enter__(self) -> Self:
        """Set the limit."""
        import mlx.core as mx

        with _lock:
            if any(block is self for block in memory_limit._open):
                raise InvalidArgumentError("This memory_limit block is open already: make one for each `with`.")
            for watch in limit_watchers:
                watch(self.limit_bytes)
            before = mx.set_memory_limit(self.limit_bytes)
            if not memory_limit._open:
                memory_limit._baseline = before
            memory_limit._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Set what the innermost open block asks for, or what was there before the first."""
        import mlx.core as mx

        with _lock:
            memory_limit._open[:] = [block for block in memory_limit._open if block is not self]
            innermost = memory_limit._open[-1].limit_bytes if memory_limit._open else memory_limit._baseline
            mx.set_memory_limit(innermost)


def open_limit_bytes() -> int | None:
    """The limit of the innermost open `memory_limit` block, in bytes; None where none is open."""
    with _lock:
        return memory_limit._open[-1].limit_bytes if memory_limit._open else None


def cache_limit() -> int:
    """The cache limit in force; MLX only tells it to whoever sets it."""
    import mlx.core as mx

    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def cache_room(budget_bytes: int, peak_bytes: int) -> int | None:
    """The cache limit with which arrays of a peak and cached buffers stay within a budget together.

    On Metal and CUDA the allocator itself releases cached buffers before active and cached bytes together exceed the
    memory limit, so that None is needed. The CPU allocator keeps up to its cache limit whatever else is held.
    """
    if devices.backend() != "cpu":
        return None
    return max(0, min(cache_limit(), budget_bytes - peak_bytes))


@contextmanager
def held_limits(limit_bytes: int | None, cache_limit_bytes: int | None) -> Iterator[None]:
    """Hold MLX's memory limit and its cache limit, each unless it is None, while the block runs."""
    with nullcontext() if limit_bytes is None else memory_limit(limit_bytes), held_cache(cache_limit_bytes):
        yield


@contextmanager
def held_cache(cache_limit_bytes: int | None) -> Iterator[None]:
    """Hold MLX's cache limit while the block runs, unless it is None."""
    import mlx.core as mx

    if cache_limit_bytes is None:
        yield
        return
    with uninterrupted():
        before = cache_limit()
    try:
        mx.set_cache_limit(cache_limit_bytes)
        yield
    finally:
        mx.set_cache_limit(before)


class MemoryBudget(int):
    """A number of bytes that says where it comes from.

    It is an int in every way; `str` of it is the explanation.

    Attributes:
        source: The counter that decided, or "given".
        fraction: The share of that counter that was taken.
        rooms: Every counter that was looked at, what MLX already holds included.
    """

    source: str
    fraction: float
    rooms: tuple[devices.Room, ...]

    def __new__(
        cls, size: int, source: str = "given", fraction: float = 1.0, rooms: tuple[devices.Room, ...] = ()
    ) -> Self:
        """Make the number and note its origin."""
        self = super().__new__(cls, size)
        self.source, self.fraction, self.rooms = source, fraction, rooms
        return self

    def __getnewargs__(self) -> tuple[int, str, float, tuple[devices.Room, ...]]:  # type: ignore[override]
        """Keep the origin through copies and pickles."""
        return int(self), self.source, self.fraction, self.rooms

    @property
    def bytes(self) -> int:
        """The number itself."""
        return int(self)

    def __str__(self) -> str:
        """The size and where it comes from."""
        if not self.rooms:
            return f"{format_bytes(int(self))} ({self.source})"
        smallest, *others = sorted(self.rooms, key=lambda room: (room.source != self.source, room.bytes))
        more = "".join(f"; {room.source}: {format_bytes(room.bytes)}" for room in others)
        took = f"{self.fraction:.0%} of {format_bytes(smallest.bytes)}"
        return f"{format_bytes(int(self))} ({took}, which is {smallest.source}{more})"

    def __format__(self, spec: str) -> str:
        """As text without a format, as the number with one."""
        return str(self) if not spec else format(int(self), spec)


@dataclass(frozen=True)
class _Held:
    """The bytes that MLX itself holds, and so could use again."""

    active_bytes: int
    cache_bytes: int


def memory_budget(fraction: float | str = 0.9) -> MemoryBudget:
    """The bytes that MLX may safely use in this process now, what its arrays hold already included.

    Metal: the recommended working set, and what the system has free. CUDA: free memory of the GPU. CPU: RAM that
    is available without swapping, and what the container's limit leaves. The smallest decides. To compare with a
    peak, which counts what is held already, MLX's own active and cached bytes are added to what is free.

    Args:
        fraction: The share to take, above 0 and up to 1, or text such as "90%". The rest is for what nobody
            counts: other processes that grow, the allocator's rounding.

    Returns:
        A whole number of bytes whose `str` says from what it was taken.

    Raises:
        InvalidArgumentError: The fraction is not above 0 and at most 1.

    Examples:
        >>> budget = memory_budget(0.5)
        >>> 0 < budget and "50%" in str(budget)
        True
    """
    share = parse_fraction(fraction)
    if share == 0:
        raise InvalidArgumentError(f"fraction={fraction!r} leaves nothing: give a number above 0 and at most 1.")
    import mlx.core as mx

    held = _Held(mx.get_active_memory(), mx.get_cache_memory())
    return _budget_from(share, devices.free_rooms(), devices.machine().working_set_bytes, held)


def _budget_from(share: float, free: tuple[devices.Room, ...], working_set: int | None, held: _Held) -> MemoryBudget:
    """The rule of `memory_budget`, over numbers alone."""
    own = held.active_bytes + held.cache_bytes
    rooms = [devices.Room(room.bytes + own, f"{room.source} and what MLX holds") for room in free]
    if working_set is not None:
        rooms.append(devices.Room(working_set, "Metal's recommended working set"))
    smallest = min(rooms, key=lambda room: room.bytes)
    return MemoryBudget(int(share * smallest.bytes), smallest.source, share, tuple(rooms))


def resolve_budget(budget: Budget) -> MemoryBudget:
    """Read a budget as every function of the library takes it.

    Args:
        budget: None for `memory_budget()`; a share of this machine's budget as a float up to 1 or text such as
            "80%"; a number of bytes as an int or text such as "24GB".

    Returns:
        The bytes, with their origin.

    Raises:
        InvalidArgumentError: Not a budget, or one of zero bytes.

    Examples:
        >>> resolve_budget("24GB")
        24000000000
    """
    if isinstance(budget, MemoryBudget):
        return budget
    if budget is None:
        return memory_budget()
    share = isinstance(budget, float) and 0 < budget <= 1
    if share or (isinstance(budget, str) and budget.strip().endswith("%")):
        return memory_budget(budget)  # type: ignore[arg-type]
    size = parse_bytes(budget)
    if size == 0:
        raise InvalidArgumentError(
            f"budget={budget!r} leaves nothing to work with: give a size such as '8GB', or None."
        )
    return MemoryBudget(size)
