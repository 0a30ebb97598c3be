"""Tracing a step: its graph, with nothing evaluated and everything it touched put back."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_tune.errors import InvalidArgumentError, TraceError
from mlx_tune.graphs.arguments import Leaf, leaves
from mlx_tune.graphs.backends import Rules, rules_of
from mlx_tune.graphs.graph import Graph
from mlx_tune.graphs.kernels import KERNELS, fold_kernels, unwrap_kernels
from mlx_tune.graphs.step_calls import Way, called, fits_inside, fitting_ways
from mlx_tune.graphs.tracing.compiled_calls import fuse_compiled_calls
from mlx_tune.graphs.tracing.failures import explain_failure, refused_primitive
from mlx_tune.graphs.tracing.first_steps import FirstStep
from mlx_tune.graphs.tracing.folding import fold_written_out
from mlx_tune.graphs.tracing.fusion import fuse
from mlx_tune.graphs.tracing.recomputation import tracing
from mlx_tune.graphs.tracing.recorder import Recorder
from mlx_tune.graphs.tracing.replaced_calls import ReplacedCalls, compiles, replacing_calls
from mlx_tune.graphs.tracing.standins import STAND_INS
from mlx_tune.graphs.tracing.surroundings import Surroundings
from mlx_tune.graphs.tracing.unmerge import unmerge
from mlx_tune.interrupts import interruptible, uninterrupted
from mlx_tune.state import Snapshot
from mlx_tune.trees import StateArray, state_arrays
from mlx_tune.units import dtype_name, format_names

#: A step whose state is still another after so many of them is taken as it is then.
_MOST_RETRACED = 3


def trace_step(
    step: Callable[..., object], args: Sequence[object], state: object = (), *, rules: Rules | None = None
) -> Graph:
    """Describe one call of `step(*args)` as a graph, without evaluating anything.

    Args:
        step: The training step. Its result may be any nesting that holds at least one array.
        args: Its arguments; arrays may be `ArraySpec`s.
        state: Objects that the step changes: models, optimizers, dictionaries and lists.
        rules: The backend whose kernels the step is to be made of; that of this machine by default.

    Returns:
        The graph. `state`, the random streams and the training flags are as they were.

    Raises:
        TraceError: The step evaluates, returns no array, leaves arrays outside of `state`, or contains
            an operation that MLX cannot export and that has no stand-in.
        InvalidArgumentError: `state` holds nothing that a step can change.
    """
    if not callable(step):
        raise InvalidArgumentError(f"step={step!r} is not callable: pass the function that runs one training step.")
    rules = rules_of() if rules is None else rules
    first = FirstStep(state)
    graph = _traced(step, args, state, first, rules)
    if not first.differs:
        return graph
    notes: list[str] = []
    with uninterrupted(), Snapshot(state):
        # What one step changes may change what the next one makes: float32 weights, and then the optimizer's state.
        while first.differs and len(notes) < _MOST_RETRACED:
            notes += first.take()
            first = FirstStep(state)
            graph = _traced(step, args, state, first, rules)
    graph.notes += dict.fromkeys(notes)
    return graph


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
        >>> import mlx.core as mx
        >>> step = lambda x, y: (x * y).sum()
        >>> batch = (mx.ones(3), mx.full(3, 2.0))
        >>> taking(step, [batch])(batch).item()
        6.0
        >>> named = dict(zip("yx", batch))
        >>> taking(mx.compile(step), [named])(named).item()
        6.0
    """
    fitting = fitting_ways(step, args, first)
    if not fitting:
        return step
    return called(step, fitting[0] if len(fitting) == 1 else _first_taken(step, fitting, args, state), len(args))


def step_of_batches(
    step: Callable[..., object], make_batch: Callable[[int], object], size: int, state: object = ()
) -> Callable[..., object]:
    """Make of a step a function of what `make_batch` returns, as `taking` does; a batch of `size` shows its form."""
    with interruptible():
        return taking(step, (make_batch(size),), state)


def _traced(
    step: Callable[..., object], args: Sequence[object], state: object, first: FirstStep, rules: Rules
) -> Graph:
    """Trace until every operation that MLX cannot export has its stand-in."""
    slots = list(state_arrays(state))
    batch = list(leaves(args, "args"))
    stand_ins: dict[str, str] = {}
    while True:
        replaced = ReplacedCalls(compiles(), rules.name, rules.fused, stand_ins=dict(stand_ins))
        try:
            return _trace(step, args, state, batch, slots, replaced, first)
        except _RefusedError as refused:
            # The exporter gives up at the first operation it does not know: trace again with its equivalent.
            stand_in = STAND_INS[refused.primitive]
            stand_ins[stand_in.name] = stand_in.words


class _RefusedError(Exception):
    """The exporter cannot describe a primitive for which there is a stand-in that was not in use."""

    def __init__(self, primitive: str) -> None:
        super().__init__(primitive)
        self.primitive = primitive


def _trace(
    step: Callable[..., object],
    args: Sequence[object],
    state: object,
    batch: list[tuple[str, Leaf]],
    slots: list[StateArray],
    replaced: ReplacedCalls,
    first: FirstStep,
) -> Graph:
    """One attempt, after which everything is as before."""
    with uninterrupted():  # a Ctrl-C comes in the step, or when everything is back
        surroundings = Surroundings(step, state)
        recorder = Recorder()
        snapshot = Snapshot(state)
        try:
            # With kernels in the place of operations that a GPU has them for, any backend's graph is built on the CPU.
            with tracing(replaced.marks.new), replacing_calls(replaced, STAND_INS.values(), KERNELS), mx.stream(mx.cpu):
                recorder.trace(step, args, batch, slots, state, replaced.marks, replaced.compiled_calls)
            first.note()
        except BaseException as error:
            primitive = refused_primitive(error)
            if primitive in STAND_INS and STAND_INS[primitive].name not in replaced.stand_ins:
                raise _RefusedError(primitive) from None
            problem = explain_failure(error)
            if problem is not None:
                raise problem from error
            if not isinstance(error, TraceError):
                described = ", ".join(f"{label} {list(leaf.shape)} {dtype_name(leaf.dtype)}" for label, leaf in batch)
                error.add_note(f"Raised while the step was traced, not run, with {described or 'no arrays'}.")
            raise
        finally:
            snapshot.restore()
            left_behind, taken_from = surroundings.restore(), surroundings.advanced()
    if taken_from:
        raise TraceError(
            f"The step takes from an iterator, {', '.join(taken_from)}, and what the trace took cannot be put back. "
            "Take the batch outside of the step and pass it as an argument. Everything else was put back."
        )
    if left_behind:
        raise TraceError(
            f"The step leaves arrays outside of what it was said to change: {format_names(left_behind, most=5)}. "
            "Return them, or pass what holds them in state=(model, optimizer, ...). Everything was put back."
        )
    return _as_evaluated(recorder, dict(replaced.stand_ins))


def _as_evaluated(recorder: Recorder, stand_ins: dict[str, str]) -> Graph:
    """From what the exporter reported to what MLX evaluates: merged and fused where, and only where, it is compiled."""
    simplified = recorder.graph
    simplified.compiled, simplified.stand_ins = bool(recorder.compiled_calls), stand_ins
    graph = unmerge(simplified, recorder.built, recorder.compiled_calls)
    if graph is None:
        stand_ins["operations that were built twice"] = "taken to be evaluated once, since they could not be told apart"
        graph = simplified
    made = fold_kernels(graph)
    fold_written_out(graph)
    unwrap_kernels(graph, made)
    if not graph.compiled:
        return graph
    return fuse(graph) if graph is simplified else fuse_compiled_calls(graph)


def _first_taken(step: Callable[..., object], ways: list[Way], args: Sequence[object], state: object) -> Way:
    """The first way that a trace of the step gets through, else the first that gets to what no trace can show.

    Of several such ways, one that the function inside a decorator takes as well comes first.
    """
    failures: list[tuple[int, Exception]] = []
    untraced: list[Way] = []
    for way in ways:
        try:
            trace_step(called(step, way, len(args)), args, state)
        except TraceError:
            untraced.append(way)
        except Exception as error:
            failures.append((-sum(1 for _ in traceback.walk_tb(error.__traceback__)), error))
        else:
            return way
    if untraced:
        return next((way for way in untraced if fits_inside(step, way, args)), untraced[0])
    _, furthest = min(failures, key=lambda failure: failure[0])
    furthest.add_note(f"The step was tried as {' and as '.join(way.text(args) for way in ways)}; none of them works.")
    raise furthest
