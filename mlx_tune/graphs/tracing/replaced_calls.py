"""The calls that differ in a traced step: checkpoints, custom gradients, operations that MLX cannot export.

For the time of a trace a few callables of `mlx.core` are replaced by ones that look at a thread-local first: on
any other thread they are the originals. They are put back when the last trace ends.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_tune.devices import Backend
from mlx_tune.graphs.arguments import argument_arrays, with_arrays
from mlx_tune.graphs.tracing.built_graph import BuiltGraph
from mlx_tune.graphs.tracing.custom_gradients import Marks, called_with_gradient, derivative_of
from mlx_tune.graphs.tracing.recomputation import traced_checkpoint
from mlx_tune.upstream import FUNCTION, function_of, random_key, referents, state_of, transformation_kind

_thread = threading.local()
_lock = threading.Lock()
_depth = 0
_originals: list[tuple[object, str, object]] = []
_NO_KERNELS: dict[str, Callable[..., object]] = {}


@dataclass(frozen=True)
class StandIn:
    """The function to call instead of `owner.name`, and its description in words.

    `function` takes the original and the trace's marks before the arguments.
    """

    owner: object
    name: str
    function: Callable[..., object]
    words: str


@dataclass
class ReplacedCalls:
    """The record of a trace: what compiled functions read and made, and which stand-ins were used, with why.

    `fused` are the functions of `mx.fast` that are one kernel on `backend`; `gradients` counts the transformations that
    are being done, compilation apart.
    """

    compiles: bool = True
    backend: Backend = "cpu"
    fused: frozenset[str] = frozenset()
    gradients: int = 0
    compiled_calls: list[tuple[list[mx.array], list[mx.array]]] = field(default_factory=list)
    stand_ins: dict[str, str] = field(default_factory=dict)
    marks: Marks = field(default_factory=Marks)
    transforms: int = 0
    kinds: dict[int, str] = field(default_factory=dict)
    alive: list[object] = field(default_factory=list)


@contextmanager
def replacing_calls(
    replaced: ReplacedCalls, stand_ins: Iterable[StandIn], kernels: Mapping[str, Callable[..., object]] = _NO_KERNELS
) -> Iterator[None]:
    """Route this thread's calls through those of the trace for the body.

    Args:
        replaced: The record of the trace, and which stand-ins it asks for.
        stand_ins: All that there are.
        kernels: Stand-ins for functions of `mx.fast` that are one kernel on the trace's backend.
    """
    global _depth
    with _lock:
        if _depth == 0:
            _install(stand_ins, kernels)
        _depth += 1
    previous = getattr(_thread, "replaced", None)
    _thread.replaced = replaced
    try:
        yield
    finally:
        _thread.replaced = previous
        with _lock:
            _depth -= 1
            if _depth == 0:
                _uninstall()


def _install(stand_ins: Iterable[StandIn], kernels: Mapping[str, Callable[..., object]]) -> None:
    operations = {(s.owner, s.name): _stand_in(s) for s in stand_ins}
    replacements: list[tuple[object, str, Callable[..., Callable[..., object]]]] = [
        (mx, "checkpoint", _checkpoint),
        (FUNCTION, "__call__", _call_transformed),
        (mx.custom_function, "__call__", _call_custom),
        (mx, "vjp", _transforming),
        (mx, "jvp", _transforming),
        (mx, "default_device", _default_device),
        *((owner, name, replacement) for (owner, name), replacement in operations.items()),
        *((mx.fast, name, _kernel(name, function)) for name, function in kernels.items()),
    ]
    for owner, name, replacement in replacements:
        original = getattr(owner, name)
        _originals.append((owner, name, original))
        setattr(owner, name, replacement(original))


def _uninstall() -> None:
    while _originals:
        setattr(*_originals.pop())


def _current() -> ReplacedCalls | None:
    return getattr(_thread, "replaced", None)


def _checkpoint(original: Callable[..., object]) -> Callable[..., object]:
    """`mx.checkpoint` called inside the step, as mlx-lm's trainer does."""

    def checkpoint(fun: Callable[..., object]) -> object:
        if _current() is None:
            return original(fun)
        return lambda *args, **kwargs: _write_out(fun, args, kwargs)

    return checkpoint


def _write_out(fun: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """Call a checkpointed function of nested arrays so that its recomputation is in the graph."""
    result: list[object] = []

    def pure(*arrays: mx.array) -> list[mx.array]:
        inner_args, inner_kwargs = with_arrays((args, kwargs), iter(arrays))
        result[:] = [fun(*inner_args, **inner_kwargs)]
        return argument_arrays(result)

    values = traced_checkpoint(pure, argument_arrays((args, kwargs)))
    return with_arrays(result, iter(values))[0]


def _call_transformed(original: Callable[..., object]) -> Callable[..., object]:
    """Calls of what `mx.compile`, `mx.checkpoint`, `mx.grad` and the like returned earlier."""

    def call(self: object, *args: object, **kwargs: object) -> object:
        replaced = _current()
        if replaced is None:
            return original(self, *args, **kwargs)
        kind = _kind(self, replaced)
        if kind == "compile":
            # MLX compiles only what is not already inside a transformation; there it traces through.
            if replaced.transforms or not replaced.compiles:
                return original(self, *args, **kwargs)
            return _compiled(original, self, args, kwargs, replaced)
        if kind == "checkpoint":
            return _write_out(function_of(self), args, kwargs)
        replaced.transforms += 1
        replaced.gradients += 1
        try:
            result = original(self, *args, **kwargs)
        finally:
            replaced.transforms -= 1
            replaced.gradients -= 1
        if kind == "unknown":
            kind = "checkpoint" if _is_custom(result) else "transform"
            replaced.kinds[id(self)] = kind
            replaced.alive.append(self)
            if kind == "checkpoint":
                return _write_out(function_of(self), args, kwargs)
        return result

    return call


def _transforming(original: Callable[..., object]) -> Callable[..., object]:
    """Transformations that are done at once: what is compiled inside is traced through."""

    def call(*args: object, **kwargs: object) -> object:
        replaced = _current() or ReplacedCalls()
        replaced.transforms += 1
        replaced.gradients += 1
        try:
            return original(*args, **kwargs)
        finally:
            replaced.transforms -= 1
            replaced.gradients -= 1

    return call


def _compiled(
    original: Callable[..., object],
    function: object,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    replaced: ReplacedCalls,
) -> object:
    """Call a compiled function, and note what it reads and makes, the state that it was given included."""
    captured = state_of(function)

    def state() -> list[mx.array]:
        return [random_key(), *argument_arrays(captured)]

    inputs = [*argument_arrays((args, kwargs)), *state()]
    replaced.transforms += 1
    try:
        result = original(function, *args, **kwargs)
    finally:
        replaced.transforms -= 1
    replaced.compiled_calls.append((inputs, [*argument_arrays(result), *state()]))
    return result


def compiles() -> bool:
    """True where `mx.compile` does anything now: it can be switched off, by a call or by the environment."""
    built = BuiltGraph([], [_PROBE(mx.array(1.0))])
    return any(node.name.startswith("Compiled") for node in built.nodes)


_PROBE = mx.compile(lambda x: mx.sin(mx.cos(x)))


def _kind(transformed: object, replaced: ReplacedCalls) -> str:
    return replaced.kinds.get(id(transformed)) or transformation_kind(transformed)


def _is_custom(result: object) -> bool:
    """True where the first array of a result was made by MLX's custom-gradient primitive, as checkpoints are."""
    arrays = argument_arrays(result)
    if not arrays:
        return False
    built = BuiltGraph([], arrays[:1])
    return built.nodes[-1].name == "CustomTransforms" if built.nodes else False


def _call_custom(original: Callable[..., object]) -> Callable[..., object]:
    """Calls of a `mx.custom_function`, which MLX cannot export: its function and its gradient are traced instead."""

    def call(self: object, *args: object, **kwargs: object) -> object:
        replaced = _current()
        if replaced is None:
            return original(self, *args, **kwargs)
        function, *others = referents(self)
        if not others:
            return function(*args, **kwargs)  # a plain function, to MLX too
        name = f"custom_function {getattr(function, '__name__', '')}".strip()
        gradient = next(filter(_is_gradient, others), None)
        replaced.stand_ins[name] = "the function, and its gradient called with placeholders"
        return called_with_gradient(function, gradient or derivative_of(function), args, kwargs, replaced.marks)

    return call


def _is_gradient(function: Callable[..., object]) -> bool:
    """True where it takes primals, cotangents and outputs; a `jvp` or `vmap` takes two arguments."""
    try:
        positional = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    except (TypeError, ValueError):
        return True
    return len(positional) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in positional)


def _stand_in(stand_in: StandIn) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Route calls of an operation to its stand-in where this thread's trace asked for it."""

    def replacement(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            replaced = _current()
            if replaced is None or stand_in.name not in replaced.stand_ins:
                return original(*args, **kwargs)
            return stand_in.function(original, replaced.marks, *args, **kwargs)

        return call

    return replacement


def _kernel(name: str, function: Callable[..., object]) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Route calls of an operation to what stands for its kernel where the traced backend has one."""

    def replacement(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            replaced = _current()
            if replaced is None or name not in replaced.fused:
                return original(*args, **kwargs)
            kwargs.pop("stream", None)
            return function(original, replaced, *args, **kwargs)

        return call

    return replacement


def _default_device(original: Callable[[], mx.Device]) -> Callable[[], mx.Device]:
    """`mlx.nn` and the losses here ask for the device to choose between kernels: for them the traced backend's counts.

    Everybody else may want a stream of it.
    """

    def call() -> mx.Device:
        replaced = _current()
        if replaced is None or not replaced.fused:
            return original()
        asks = sys._getframe(1).f_globals.get("__name__", "")
        return mx.Device(mx.gpu) if asks.startswith(("mlx.nn.", "mlx_tune.losses.")) else original()

    return call
