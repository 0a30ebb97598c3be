"""Calling a step with a batch: whole, or spread over the arguments that its signature asks for."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import mlx.nn as nn

from mlx_tune.errors import InvalidArgumentError, TraceError
from mlx_tune.graphs.tracing.trace import trace_step
from mlx_tune.interrupts import interruptible
from mlx_tune.upstream import TRANSFORMED, function_of

#: The attribute of functions for which it is decided how they are given a batch.
_SETTLED = "__takes_a_batch__"


def taking(
    step: Callable[..., object], args: Sequence[object], state: object = (), *, first: object = None
) -> Callable[..., object]:
    """Make of a step a function that can be called with `args`, of which a single one may be a whole batch.

    A tuple, list or dictionary is handed over whole where the step takes one argument, and spread over several, by
    position or by name, where its signature asks for that. The signature is read through `mx.compile`, `mx.grad`,
    `functools.partial`, methods and objects that can be called. Where it allows both, or cannot be read, the step is
    traced with one and then the other, with nothing evaluated, and the first that it takes counts.

    Args:
        step: The function.
        args: The arguments that it is going to be called with, or something of the same form.
        state: Objects that it changes; needed where it has to be traced.
        first: An argument that comes before the others if the step asks for one more.

    Returns:
        A function of `args`: the step itself where nothing has to be done.

    Raises:
        InvalidArgumentError: The step's arguments are neither one batch nor what the batch holds.
        Exception: Whatever the step raises where it was traced and took the batch in no way.

    Examples:
        >>> step = lambda x, y: (x * y).sum()
        >>> batch = (mx.ones(3), mx.full(3, 2.0))
        >>> taking(step, [batch])(batch).item()
        6.0
        >>> named = dict(zip("yx", batch))
        >>> taking(mx.compile(step), [named])(named).item()
        6.0
    """
    ways = _ways(args, [()] if first is None else [(), (first,)])
    if len(ways) == 1 or not callable(step) or getattr(step, _SETTLED, False):
        return step
    signature = _signature(step)
    fitting = [way for way in ways if signature is None or _binds(signature, way, args)]
    if not fitting and ways[-1].spread:
        raise InvalidArgumentError(_misfit(step, signature, ways, args[0]))
    if not fitting or fitting == ways[:1]:
        return step  # where arguments are missing, calling it says which
    way = fitting[0] if len(fitting) == 1 else _first_taken(step, fitting, args, state)
    return _called(step, way, len(args))


def step_of_batches(
    step: Callable[..., object], make_batch: Callable[[int], object], size: int, state: object = ()
) -> Callable[..., object]:
    """Make of a step a function of what `make_batch` returns, as `taking` does; a batch of `size` shows its form."""
    with interruptible():
        return taking(step, (make_batch(size),), state)


def require_functions(step: object, make_batch: object) -> None:
    """Refuse a step or a maker of batches that cannot be called, before any work is done with them.

    Args:
        step: The function that should run one training step.
        make_batch: The function that should return the longest batch of n.

    Raises:
        InvalidArgumentError: One of them is no function; the text has both.
    """
    if not (callable(step) and callable(make_batch)):
        raise InvalidArgumentError(
            f"step={step!r}, make_batch={make_batch!r}: both must be functions, the step of a batch and the other of "
            "the number of rows in it."
        )


@dataclass(frozen=True)
class _Way:
    """One way of calling the step.

    Attributes:
        before: Arguments that go first.
        spread: The batch's items are the arguments, by position or name; otherwise it is itself one.
    """

    before: tuple[object, ...] = ()
    spread: bool = False

    def arguments(self, args: Sequence[Any]) -> tuple[tuple[object, ...], dict[str, Any]]:
        """By position, and by name."""
        batch = args[0] if self.spread else tuple(args)
        return (self.before, dict(batch)) if isinstance(batch, dict) else ((*self.before, *batch), {})

    def text(self, args: Sequence[object]) -> str:
        """As it is written in Python."""
        given = "batch" if len(args) == 1 else "*args"
        stars = ("**" if isinstance(args[0], dict) else "*") if self.spread else ""
        return f"step({'model, ' if self.before else ''}{stars}{given})"


def _ways(args: Sequence[object], before: list[tuple[object, ...]]) -> list[_Way]:
    """Those that the arguments allow, the plainest first."""
    batch = args[0] if len(args) == 1 else None
    by_name = isinstance(batch, dict) and not isinstance(batch, nn.Module) and all(isinstance(k, str) for k in batch)
    spreads = (False, True) if by_name or isinstance(batch, (tuple, list)) else (False,)
    return [_Way(first, spread) for spread in spreads for first in before]


def _signature(step: Callable[..., object], *, follow_wrapped: bool = False) -> inspect.Signature | None:
    """The signature of a function; None where that cannot be read.

    A decorator counts with its own arguments, not with those of the function that it passes for: it may add some.
    """
    try:
        return inspect.signature(_plain(step), follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        return None


def _plain(step: Any) -> Any:
    """The Python function inside MLX's transformations: what those say of their arguments leaves some kinds out."""
    if isinstance(step, tuple(TRANSFORMED)):
        return _plain(function_of(step))
    if isinstance(step, partial):
        return partial(_plain(step.func), *step.args, **step.keywords)
    return MethodType(_plain(step.__func__), step.__self__) if isinstance(step, MethodType) else step


def _binds(signature: inspect.Signature, way: _Way, args: Sequence[object]) -> bool:
    positional, named = way.arguments(args)
    try:
        signature.bind(*positional, **named)
    except TypeError:  # of the signature: nothing of the step has been called
        return False
    return True


def _first_taken(step: Callable[..., object], ways: list[_Way], args: Sequence[object], state: object) -> _Way:
    """The first way that a trace of the step gets through, else the first that gets to what no trace can show.

    Of several such ways, one that the function inside a decorator takes as well comes first.
    """
    failures: list[tuple[int, Exception]] = []
    untraced: list[_Way] = []
    for way in ways:
        try:
            trace_step(_called(step, way, len(args)), args, state)
        except TraceError:
            untraced.append(way)
        except Exception as error:
            failures.append((-sum(1 for _ in traceback.walk_tb(error.__traceback__)), error))
        else:
            return way
    if untraced:
        inner = _signature(step, follow_wrapped=True)
        return next((way for way in untraced if inner is not None and _binds(inner, way, args)), untraced[0])
    _, furthest = min(failures, key=lambda failure: failure[0])
    furthest.add_note(f"The step was tried as {' and as '.join(way.text(args) for way in ways)}; none of them works.")
    raise furthest


def _called(step: Callable[..., object], way: _Way, count: int) -> Callable[..., object]:
    """The step, called in one of the ways."""
    if count != 1:
        return partial(step, *way.before)

    def given(batch: object) -> object:
        positional, named = way.arguments((batch,))
        return step(*positional, **named)

    setattr(given, _SETTLED, True)
    given.__module__ = getattr(step, "__module__", None) or given.__module__  # whose code it is, for the trace
    return given


def _misfit(step: object, signature: object, ways: list[_Way], batch: Any) -> str:
    name = getattr(step, "__name__", None) or type(step).__name__
    holds = list(batch) if isinstance(batch, dict) else len(batch)
    return (
        f"{name}{signature} cannot be called with a {type(batch).__name__} of {holds}: it fits none of "
        f"{', '.join(way.text((batch,)) for way in ways)}. Let make_batch return what the step takes, or pass a "
        "function of one batch, such as `lambda batch: step(batch[0], batch[1])`."
    )
