"""Calling a step with a batch: whole, or spread over the arguments that its signature asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import mlx.nn as nn

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.upstream import TRANSFORMED, function_of

#: The attribute of functions for which it is decided how they are given a batch.
_SETTLED = "__takes_a_batch__"


def fitting_ways(step: Callable[..., object], args: Sequence[object], first: object = None) -> list[Way]:
    """The ways of calling a step that its signature allows; none where it is called as it is.

    Args:
        step: The function.
        args: The arguments that it is going to be called with.
        first: An argument that comes before the others if the step asks for one more.

    Raises:
        InvalidArgumentError: The step's arguments are neither one batch nor what the batch holds.
    """
    ways = _ways(args, [()] if first is None else [(), (first,)])
    if len(ways) == 1 or not callable(step) or getattr(step, _SETTLED, False):
        return []
    signature = _signature(step)
    fitting = [way for way in ways if signature is None or _binds(signature, way, args)]
    if not fitting and ways[-1].spread:
        raise InvalidArgumentError(_misfit(step, signature, ways, args[0]))
    return [] if fitting == ways[:1] else fitting  # where arguments are missing, calling it says which


def fits_inside(step: Callable[..., object], way: Way, args: Sequence[object]) -> bool:
    """True where the function inside a decorator takes its arguments that way as well."""
    signature = _signature(step, follow_wrapped=True)
    return signature is not None and _binds(signature, way, args)


def require_functions(step: object, make_batch: object, linear_step: object = None) -> None:
    """Refuse a step or a maker of batches that cannot be called, before any work is done with them.

    Args:
        step: The function that should run one training step.
        make_batch: The function that should return the longest batch of n.
        linear_step: A second step, or None.

    Raises:
        InvalidArgumentError: One of them is no function; the text has it.
    """
    if not (callable(step) and callable(make_batch)):
        raise InvalidArgumentError(
            f"step={step!r}, make_batch={make_batch!r}: both must be functions, the step of a batch and the other of "
            "the number of rows in it."
        )
    if not (linear_step is None or callable(linear_step)):
        raise InvalidArgumentError(f"linear_step={linear_step!r}: it must be a function, as step is, or None.")


@dataclass(frozen=True)
class Way:
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


def _ways(args: Sequence[object], before: list[tuple[object, ...]]) -> list[Way]:
    """Those that the arguments allow, the plainest first."""
    batch = args[0] if len(args) == 1 else None
    by_name = isinstance(batch, dict) and not isinstance(batch, nn.Module) and all(isinstance(k, str) for k in batch)
    spreads = (False, True) if by_name or isinstance(batch, (tuple, list)) else (False,)
    return [Way(first, spread) for spread in spreads for first in before]


def _signature(step: Callable[..., object], *, follow_wrapped: bool = False) -> inspect.Signature | None:
    """The signature of a function; None where that cannot be read.

    A decorator counts with its own arguments, not with those of the function that it passes for: it may add some.
    """
    try:
        return inspect.signature(_plain(step), follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        return None


def _plain(step: object) -> Any:
    """The Python function inside MLX's transformations: what those say of their arguments leaves some kinds out."""
    if isinstance(step, tuple(TRANSFORMED)):
        return _plain(function_of(step))
    if isinstance(step, partial):
        return partial(_plain(step.func), *step.args, **step.keywords)
    return MethodType(_plain(step.__func__), step.__self__) if isinstance(step, MethodType) else step


def _binds(signature: inspect.Signature, way: Way, args: Sequence[object]) -> bool:
    positional, named = way.arguments(args)
    try:
        signature.bind(*positional, **named)
    except TypeError:  # of the signature: nothing of the step has been called
        return False
    return True


def called(step: Callable[..., object], way: Way, count: int) -> Callable[..., object]:
    """The step, called in one of the ways."""
    if count != 1:
        return partial(step, *way.before)

    def given(batch: object) -> object:
        positional, named = way.arguments((batch,))
        return step(*positional, **named)

    setattr(given, _SETTLED, True)
    given.__module__ = getattr(step, "__module__", None) or given.__module__  # whose code it is, for the trace
    return given


def _misfit(step: object, signature: object, ways: list[Way], batch: Any) -> str:
    name = getattr(step, "__name__", None) or type(step).__name__
    holds = list(batch) if isinstance(batch, dict) else len(batch)
    return (
        f"{name}{signature} cannot be called with a {type(batch).__name__} of {holds}: it fits none of "
        f"{', '.join(way.text((batch,)) for way in ways)}. Let make_batch return what the step takes, or pass a "
        "function of one batch, such as `lambda batch: step(batch[0], batch[1])`."
    )
