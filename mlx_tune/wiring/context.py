"""`wired_limit`: the context manager and decorator."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from mlx_tune import memory
from mlx_tune.presentation.plain import Json
from mlx_tune.units import format_bytes, parse_fraction
from mlx_tune.wiring import limits
from mlx_tune.wiring.ledger import Share, ledger
from mlx_tune.wiring.registry import Registry, WiredRequest, total_bytes

OFF_VARIABLE = "MLX_TUNE_NO_WIRING"
#: A memory limit below this many times the wired bytes counts as tight.
SLACK = 1.25

_Function = TypeVar("_Function", bound=Callable[..., object])


def _set_limit(limit: int) -> int:
    import mlx.core as mx

    return mx.set_wired_limit(limit)


def _clear_cache() -> None:
    import mlx.core as mx

    mx.clear_cache()


#: The one registry of the process: MLX has one limit.
registry = Registry(_set_limit, _clear_cache, lambda limit: ledger.settle(limit))


class wired_limit:  # noqa: N801 - used as a function
    """Let the system keep a model's memory resident while a block runs, and put the limit back after it.

    macOS may take memory away from an idle GPU buffer, and bringing tens of gigabytes back costs seconds. Wired
    memory stays. It pays where the model is close to what the GPU may use (70B fp16 on an M2 Ultra went from 0.23
    to 4.7 tokens a second, mlx-examples#1069), and does nothing for small ones: `mlx-tune doctor --bench --only
    wired` measures it on your machine.

    Blocks share the process's one limit: it is what all live blocks want together (each distinct array once), at
    least what was set before the first, at most what this machine may wire. They may overlap and end in any
    order, thread or task. The cache is cleared before the limit is raised, so that live arrays get the room.
    Where the backend has nothing to wire (CPU, CUDA, macOS before 15) the block runs all the same, and `reason`
    says why; `MLX_TUNE_NO_WIRING=1` does that anywhere.

    Args:
        model: A model: its parameters, tied ones once, plus `headroom`. An optimizer, arrays, or a list or dictionary
            of all these will do. Bytes, or text such as "24GB". None: as much as this machine may wire.
        headroom: The share to add to a model for what computing with it makes, such as its key-value cache: 0.2
            or "20%". Bytes are taken as they are.
        streams: Streams to synchronize when the block ends, before the limit is lowered: those on which
            `mx.async_eval` may still be at work.
        share: Keep the sum of what all processes wire that share below what this machine may wire: each enters what
            it wires in a file of the user's, and gets what the others leave. Processes that have died do not count;
            nothing waits for another process longer than a second. A process that has shared once enters everything
            that it wires from then on. Without it a process counts on having the machine to itself.

    Attributes:
        applied: True where memory is being wired for this block.
        limit_bytes: The process's limit once this block was entered; 0 where it is not applied.
        requested_bytes: The bytes that this block alone asked for.
        reason: Why it is not applied, or why the limit is below what was asked for; else empty.

    Warns:
        UserWarning: The model comes within 10 % of what may be wired; the text holds the `sysctl` line that
            raises it. Or: the memory limit that is in force leaves MLX so little slack that it makes and releases
            buffers all the time, which while wired is what mlx#3186's kernel panic is about.
        RuntimeWarning: The backend refused the limit.

    Raises:
        InvalidArgumentError: A model without arrays, not a size, or a headroom outside 0 to 1.

    Examples:
        >>> import mlx.nn as nn
        >>> model = nn.Linear(64, 64, bias=False)
        >>> with wired_limit(model) as wired:
        ...     wired.requested_bytes
        19660
    """

    def __init__(
        self,
        model: object = None,
        headroom: float | str = "20%",
        streams: Iterable[Any] = (),
        *,
        share: bool = False,
    ) -> None:
        """Check the arguments. The parameters of a model are read when the block is entered."""
        limits.check_wanted(model)
        self._model = model
        self._headroom = parse_fraction(headroom)
        self._streams = tuple(streams)
        self._share = share
        # One entry for each time that this block was entered and not left; None where nothing was wired.
        self._entries: list[weakref.finalize[..., Any] | None] = []
        self._stacklevel = 3  # from `_ask` to the line with the `with`
        self.applied = False
        self.limit_bytes = 0
        self.requested_bytes = 0
        self.reason = "not entered yet"

    def __enter__(self) -> Self:
        """Ask for the memory; never fails for what the backend lacks."""
        capacity = limits.read_capacity()
        request = limits.read_request(self._model, self._headroom, capacity.cap_bytes)
        self.applied, self.limit_bytes, self.requested_bytes = False, 0, total_bytes([request])
        self.reason = capacity.reason
        if os.environ.get(OFF_VARIABLE, "0") not in ("", "0"):
            self.reason = f"{OFF_VARIABLE} is set in the environment"
        self._entries.append(None)
        try:
            if not self.reason:
                self._ask(request, capacity)
        except BaseException:  # an interrupt, or a warning that is an error here: nobody will call `__exit__`
            self._leave()
            raise
        return self

    def _ask(self, request: WiredRequest, capacity: limits.Capacity) -> None:
        token = registry.make_token()
        # Whoever drops an entered block without leaving it, a generator that nobody finished for one, has left it.
        # This comes first, so that an interrupt cannot lose the request.
        self._entries[-1] = finalizer = weakref.finalize(self, registry.leave, token)
        finalizer.atexit = False  # the limit ends with the process

        def allow(wanted: int) -> int:
            granted = ledger.claim(wanted, capacity.cap_bytes)
            if granted == 0:
                raise PermissionError(_taken(ledger.seen, capacity.cap_bytes))
            return granted

        shared = self._share or ledger.active
        try:
            limit = registry.enter(token, request, capacity.cap_bytes, allow if shared else None)
        except (RuntimeError, ValueError, OSError) as error:
            self._entries[-1] = None
            finalizer.detach()
            self.reason = str(error) if isinstance(error, OSError) else f"the backend refused the limit: {error}"
            warnings.warn(f"Nothing is wired: {self.reason}", RuntimeWarning, self._stacklevel)
            return
        self.applied, self.limit_bytes = True, limit
        if shared and ledger.seen and self.requested_bytes > limit:
            taken = _taken(ledger.seen, capacity.cap_bytes)
            self.reason = f"{format_bytes(self.requested_bytes)} were asked for; {taken}"
        elif self.requested_bytes > limit:
            self.reason = (
                f"{format_bytes(self.requested_bytes)} were asked for; this machine may wire "
                f"{format_bytes(capacity.cap_bytes)} (Metal recommends {format_bytes(capacity.recommended_bytes)}, "
                f"RAM is {format_bytes(capacity.memory_bytes)})"
            )
        model_bytes = sum(request.arrays.values())
        closeness = limits.closeness_warning(model_bytes, capacity) if request.arrays else None
        for text in (closeness, _tightness_warning(limit, memory.open_limit_bytes())):
            if text is not None:
                warnings.warn(text, UserWarning, self._stacklevel)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the given streams, take this block's request back, and let the block's exception through.

        A stream that cannot be synchronized raises only where the block itself did not; the limit is restored first.
        """
        trouble: BaseException | None = None
        for end in (*self._synchronizers(), self._leave):
            try:
                end()
            except BaseException as failure:  # an interrupt too must not keep the limit from being restored
                trouble = trouble or failure
        if trouble is None:
            return
        if error is None:
            raise trouble
        error.add_note(f"wired_limit could not end cleanly: {type(trouble).__name__}: {trouble}")

    def _synchronizers(self) -> list[Callable[[], None]]:
        import mlx.core as mx

        return [functools.partial(mx.synchronize, stream) for stream in self._streams] if self.applied else []

    def _leave(self) -> None:
        finalizer = self._entries.pop()
        if finalizer is not None:
            finalizer()

    def __call__(self, function: _Function) -> _Function:
        """Wire for as long as each call of the function runs; for a generator or coroutine, until it ends.

        Every call is a block of its own, so recursion and threads are no matter.
        """
        wrapped: object
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapped(*args: object, **kwargs: object) -> object:
                with self._again():
                    return await function(*args, **kwargs)

        elif inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def wrapped(*args: object, **kwargs: object) -> object:
                with self._again():
                    async with contextlib.aclosing(function(*args, **kwargs)) as items:
                        try:
                            item = await anext(items)
                            while True:
                                try:
                                    sent = yield item
                                except GeneratorExit:
                                    raise
                                except BaseException as thrown:
                                    item = await items.athrow(thrown)
                                else:
                                    item = await items.asend(sent)
                        except StopAsyncIteration:
                            return

        elif inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def wrapped(*args: object, **kwargs: object) -> Any:
                with self._again():
                    return (yield from function(*args, **kwargs))

        else:

            @functools.wraps(function)
            def wrapped(*args: object, **kwargs: object) -> object:
                with self._again():
                    return function(*args, **kwargs)

        return cast(_Function, wrapped)

    def _again(self) -> wired_limit:
        block = wired_limit(self._model, self._headroom, self._streams, share=self._share)
        block._stacklevel += 1  # the wrapper stands between the `with` and the caller
        return block

    def __str__(self) -> str:
        """One line."""
        if not self.applied:
            return f"not wired: {self.reason}"
        text = f"{format_bytes(self.requested_bytes)} wired, the limit is {format_bytes(self.limit_bytes)}"
        return f"{text}; {self.reason}" if self.reason else text

    def to_dict(self) -> dict[str, Json]:
        """The same, ready for JSON."""
        return {name: getattr(self, name) for name in ("applied", "limit_bytes", "requested_bytes", "reason")}


def _taken(others: tuple[Share, ...], cap_bytes: int) -> str:
    """The shares of other processes, in words."""
    named = ", ".join(f"process {share.pid} {format_bytes(share.wired_bytes)}" for share in others)
    return f"of the {format_bytes(cap_bytes)} that all processes together may wire, others have: {named}"


def _warn_of_tightness(limit_bytes: int) -> None:
    """Called with every memory limit that is about to be set."""
    text = _tightness_warning(registry.limit_bytes, limit_bytes) if registry.live else None
    if text is not None:
        warnings.warn(text, UserWarning, stacklevel=4)


memory.limit_watchers.append(_warn_of_tightness)


def _tightness_warning(wired_bytes: int, limit: int | None) -> str | None:
    if limit is None or limit >= SLACK * wired_bytes:
        return None
    return (
        f"The memory limit of {format_bytes(limit)} leaves little slack above {format_bytes(wired_bytes)} of wired "
        "memory: MLX would make and release wired buffers all the time, which is what the kernel panic of mlx#3186 "
        f"is about. Raise the limit to {format_bytes(SLACK * wired_bytes)} or wire less."
    )
