"""One answer for all: a search on several machines, each of which runs its own trials."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from mlx_tune.errors import InvalidArgumentError, TraceError, TrialError
from mlx_tune.measuring.floors import Floor
from mlx_tune.measuring.step import StepTrial
from mlx_tune.measuring.step_outcome import is_out_of_memory

T = TypeVar("T")

#: Figures travel as 64-bit whole numbers: times in millionths of a second, and up to 9 TB still fit.
_MICRO = 1_000_000


class Ranks:
    """The processes that search together.

    Every exchange carries whether its rank failed, so that when one raises, the others raise too instead of waiting
    for it.

    Args:
        group: From `mx.distributed.init()`, or None: then the group of `mlx.launch`, where it started this process.
    """

    def __init__(self, group: Any = None) -> None:
        """Join."""
        if group is None and "MLX_RANK" in os.environ:
            import mlx.core as mx

            group = mx.distributed.init()
        self.group = group
        self.size: int = 1 if group is None else group.size()
        self.rank: int = 0 if group is None else group.rank()

    @classmethod
    def alone(cls) -> Ranks:
        """A process that agrees with itself, wherever it was started."""
        self = cls.__new__(cls)
        self.group, self.size, self.rank = None, 1, 0
        return self

    def _gather(self, row: Sequence[int]) -> list[list[int]]:
        import mlx.core as mx

        if self.size == 1:
            return [list(row)]
        # On the stream that the group itself chooses: NCCL knows none of the processor's, other backends no other.
        flat = mx.distributed.all_gather(mx.array([row], mx.int64), group=self.group)
        rows: Any = flat.tolist()
        return [[int(value) for value in values] for values in rows]

    def agree(self, function: Callable[[], T]) -> T:
        """Call a function on every rank.

        Raises:
            TrialError: It raised on another rank. Where it raised here, that exception.
        """
        result, error = self._attempt(function)
        self._share([], error)
        return result  # type: ignore[return-value]

    def any(self, function: Callable[[], bool]) -> bool:
        """True where a function is true on any rank; an exception as for `agree`."""
        result, error = self._attempt(function)
        return any(row[0] for row in self._share([int(bool(result))], error))

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return min(row[0] for row in self._gather([value]))

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        return max(row[0] for row in self._gather([value]))

    def largest_figure(self, figure: Callable[[], float]) -> float:
        """The largest of all ranks' figures: bytes as they are, seconds to the microsecond; errors as for `agree`."""
        own = self.agree(figure)
        return own if self.size == 1 else self.largest(round(own * _MICRO)) / _MICRO

    def step(self, run: Callable[[], StepTrial]) -> StepTrial:
        """Run a step on every rank at once: the highest peak and the longest time count, and a fault on any.

        Raises:
            MemoryError: It ran out of memory on another rank. Where it did here, that exception.
            TrialError: It raised anything else on another rank. Where it did here, that exception.
        """
        own, error = self._attempt(run)
        died = isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error)
        row = [int(died), 0, 0, 0] if own is None else [0, own.peak_bytes, round(own.seconds * _MICRO), bool(own.fault)]
        rows = self._share([int(figure) for figure in row], None if died else error)
        if died and error is not None:
            raise error
        if any(figures[0] for figures in rows):
            raise MemoryError("out of memory on another rank")
        assert own is not None
        _, peak, micros, faulty = (max(figures) for figures in zip(*rows, strict=True))
        fault = own.fault or ("The loss at batch size {size} is faulty on another rank." if faulty else None)
        return replace(own, peak_bytes=peak, seconds=max(own.seconds, micros / _MICRO), fault=fault)

    def same(self, **values: object) -> None:
        """See that every rank was given the same: what decides where a search goes must not differ.

        Raises:
            InvalidArgumentError: On every rank, naming what differs.
        """
        rows = self._gather([zlib.crc32(repr(value).encode()) for value in values.values()])
        for (name, value), *given in zip(values.items(), *rows, strict=True):
            other = next((rank for rank, code in enumerate(given) if code != given[self.rank]), None)
            if other is not None:
                raise InvalidArgumentError(
                    f"{name}={value!r} here, on rank {self.rank}, and something else on rank {other}: give the same on "
                    f"every rank."
                )

    def largest_floor(self, estimate: Callable[[int], Floor]) -> Callable[[int], Floor]:
        """An estimate of which every rank sees the largest; one rank's `TraceError` is everybody's."""
        if self.size == 1:
            return estimate

        def shared(size: int) -> Floor:
            untraceable: TraceError | None = None

            def own() -> Floor | None:
                nonlocal untraceable
                try:
                    return estimate(size)
                except TraceError as error:
                    untraceable = error
                    return None

            value, error = self._attempt(own)
            rows = self._share([-1, 0] if value is None else [value.bytes, len(value.live)], error)
            if value is None or any(row[0] < 0 for row in rows):
                raise untraceable or TraceError("another rank's step cannot be traced")
            needed = max(row[0] for row in rows)
            if any(row[1] != len(value.live) for row in rows):
                return Floor(needed)  # the ranks' steps run other operations
            return Floor(needed, tuple(max(alive) for alive in zip(*self._gather(value.live), strict=True)))

        return shared

    def first_knots(self, read: Callable[[], dict[int, int]]) -> dict[int, int]:
        """Rank 0's estimates by size, if every rank can read any; the others may have looked at other sizes."""
        if self.size == 1:
            return read()
        untraceable: list[TraceError] = []

        def own() -> dict[int, int]:
            try:
                return read()
            except TraceError as error:
                untraceable.append(error)
                return {}

        knots = self.agree(own)
        counts = [row[0] for row in self._gather([len(knots)])]
        if 0 in counts:
            raise untraceable[0] if untraceable else TraceError("another rank's step cannot be traced")
        mine = [value for item in knots.items() for value in item] if self.rank == 0 else [0] * (2 * counts[0])
        flat = self._gather(mine)[0]
        return dict(zip(flat[::2], flat[1::2], strict=True))

    @staticmethod
    def _attempt(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
        try:
            return function(), None
        except BaseException as error:  # the others must hear of a Ctrl-C, too
            return None, error

    def _share(self, row: Sequence[int], error: BaseException | None) -> list[list[int]]:
        """Exchange rows; raise on every rank if there was an error on any."""
        rows = self._gather([int(error is not None), *row])
        if error is not None:
            raise error
        failed = [rank for rank, values in enumerate(rows) if values[0]]
        if failed:
            raise TrialError(
                f"Rank {failed[0]} raised during the search, so rank {self.rank} stops too: see that rank's own error."
            )
        return [values[1:] for values in rows]
