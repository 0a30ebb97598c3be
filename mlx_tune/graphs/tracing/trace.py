"""Tracing a step: its graph, with nothing evaluated and everything it touched put back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_tune.errors import InvalidArgumentError, TraceError
from mlx_tune.graphs.arguments import ArraySpec, Leaf, arrays_of, leaves, with_arrays
from mlx_tune.graphs.graph import CompiledCall, Graph, Node, Value, dtype_name
from mlx_tune.graphs.tracing.built import BuiltGraph, made_by_operations
from mlx_tune.graphs.tracing.compiled_calls import fuse_compiled_calls
from mlx_tune.graphs.tracing.custom_gradients import Marks
from mlx_tune.graphs.tracing.failures import explain_failure, refused_primitive
from mlx_tune.graphs.tracing.first_steps import FirstStep
from mlx_tune.graphs.tracing.folding import fold_written_out
from mlx_tune.graphs.tracing.fusion import fuse
from mlx_tune.graphs.tracing.interception import Interception, compiles, intercepted
from mlx_tune.graphs.tracing.recomputation import tracing
from mlx_tune.graphs.tracing.standins import STAND_INS
from mlx_tune.graphs.tracing.surroundings import Surroundings
from mlx_tune.graphs.tracing.unmerge import unmerge
from mlx_tune.interrupts import interruptible, uninterrupted
from mlx_tune.state import Snapshot
from mlx_tune.trees import StateArray, state_arrays

#: A step whose state is still another after so many of them is taken as it is then.
_MOST_RETRACED = 3


def trace_step(step: Callable[..., object], args: Sequence[object], state: object = ()) -> Graph:
    """Describe one call of `step(*args)` as a graph, without evaluating anything.

    Args:
        step: The training step. Its result may be any nesting that holds at least one array.
        args: Its arguments; arrays may be `ArraySpec`s.
        state: Objects that the step changes: models, optimizers, dictionaries and lists.

    Returns:
        The graph. `state`, the random streams and the training flags are as they were.

    Raises:
        TraceError: The step evaluates, returns no array, leaves arrays outside of `state`, or contains
            an operation that MLX cannot export and that has no stand-in.
        InvalidArgumentError: `state` holds nothing that a step can change.
    """
    if not callable(step):
        raise InvalidArgumentError(f"step={step!r} is not callable: pass the function that runs one training step.")
    first = FirstStep(state)
    graph = _traced(step, args, state, first)
    if not first.differs:
        return graph
    notes: list[str] = []
    with uninterrupted(), Snapshot(state):
        # What one step changes may change what the next one makes: float32 weights, and then the optimizer's state.
        while first.differs and len(notes) < _MOST_RETRACED:
            notes += first.take()
            first = FirstStep(state)
            graph = _traced(step, args, state, first)
    graph.notes += dict.fromkeys(notes)
    return graph


def _traced(step: Callable[..., object], args: Sequence[object], state: object, first: FirstStep) -> Graph:
    """Trace until every operation that MLX cannot export has its stand-in."""
    slots = list(state_arrays(state))
    batch = list(leaves(args, "args"))
    stand_ins: dict[str, str] = {}
    while True:
        interception = Interception(compiles=compiles(), stand_ins=dict(stand_ins))
        try:
            return _trace(step, args, state, batch, slots, interception, first)
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
    interception: Interception,
    first: FirstStep,
) -> Graph:
    """One attempt, after which everything is as before."""
    with uninterrupted():  # a Ctrl-C comes in the step, or when everything is back
        surroundings = Surroundings(step, state)
        recorder = _Recorder()
        snapshot = Snapshot(state)
        try:
            with tracing(), intercepted(interception, STAND_INS.values()):
                recorder.trace(step, args, batch, slots, state, interception)
            first.note()
        except BaseException as error:
            primitive = refused_primitive(error)
            if primitive in STAND_INS and STAND_INS[primitive].name not in interception.stand_ins:
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
            f"The step leaves arrays outside of what it was said to change: {_listed(left_behind)}. "
            "Return them, or pass what holds them in state=(model, optimizer, ...). Everything was put back."
        )
    return _as_evaluated(recorder, dict(interception.stand_ins))


def _as_evaluated(recorder: _Recorder, stand_ins: dict[str, str]) -> Graph:
    """From what the exporter reported to what MLX evaluates: merged and fused where, and only where, it is compiled."""
    simplified = recorder.graph
    simplified.compiled, simplified.stand_ins = bool(recorder.compiled_calls), stand_ins
    graph = unmerge(simplified, recorder.built, recorder.compiled_calls)
    if graph is None:
        stand_ins["operations that were built twice"] = "taken to be evaluated once, since they could not be told apart"
        graph = simplified
    fold_written_out(graph)
    if not graph.compiled:
        return graph
    return fuse(graph) if graph is simplified else fuse_compiled_calls(graph)


class _Recorder:
    """Takes what MLX's exporter reports and turns it into a graph."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.compiled_calls: list[CompiledCall] = []
        self.marks = Marks()
        self._names: dict[str, int] = {}
        self._inputs: list[Value] = []

    def trace(
        self,
        step: Callable[..., object],
        args: Sequence[object],
        batch: list[tuple[str, Leaf]],
        slots: list[StateArray],
        state: object,
        interception: Interception,
    ) -> None:
        unique: dict[int, int] = {}
        arrays: list[mx.array] = []
        positions: list[int] = []
        for label, leaf in batch:
            array = mx.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, ArraySpec) else leaf
            # The same array twice is one array; the same description twice describes two.
            position = unique.get(id(leaf), len(arrays)) if array is leaf else len(arrays)
            positions.append(position)
            if position == len(arrays):
                arrays.append(array)
                self._inputs.append(Value(tuple(array.shape), array.dtype, "batch", label))
                if array is leaf:
                    unique[id(leaf)] = position
        for slot in slots:
            if id(slot.array) not in unique:
                unique[id(slot.array)] = len(arrays)
                arrays.append(slot.array)
                self._inputs.append(Value(tuple(slot.array.shape), slot.array.dtype, slot.role, slot.label))
        kept: set[int] = set()
        self.marks = interception.marks

        def flat(*tracers: mx.array) -> list[mx.array]:
            # Writing into an array in place gives the same object another value: these are the ones before.
            inputs = [copy.copy(tracer) for tracer in tracers]
            place = {key: tracers[i] for key, i in unique.items()}
            for slot in slots:
                slot.put(place[id(slot.array)])
            with interruptible():
                result = step(*with_arrays(args, (tracers[i] for i in positions)))
            outputs = arrays_of(result)
            if not outputs:
                raise TraceError(_without_arrays(result))
            self.graph.results = len(outputs)
            written = made_by_operations(tracers)
            untouched = {id(place[id(s.array)]): id(s.array) for s in slots if id(place[id(s.array)]) not in written}
            after = list(state_arrays(state))
            kept.update(untouched[id(slot.array)] for slot in after if id(slot.array) in untouched)
            updated = [slot for slot in after if id(slot.array) not in untouched]
            self.graph.updated = [slot.label for slot in updated]
            everything = [*outputs, *(slot.array for slot in updated)]
            around = [array for call in interception.compiled_calls for side in call for array in side]
            self.built = BuiltGraph(inputs, everything, around)
            names = iter(self.built.others)
            self.compiled_calls = [
                CompiledCall(*(tuple(name for _ in side if (name := next(names)) is not None) for side in call))
                for call in interception.compiled_calls
            ]
            return everything

        if not arrays:
            arrays, unique[0] = [mx.array(0.0)], 0
            self._inputs.append(Value((), mx.float32, "captured", "nothing"))
        mx.export_function(self._see, flat, *arrays)
        self.graph.held |= {*positions, *(unique[key] for key in kept)}

    def _see(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        graph = self.graph
        if kind == "primitive":
            names, place = self._names, self._value
            read = tuple([names[a[0]] if a[0] in names else place(a) for a in event["inputs"]])
            made = tuple(map(place, event["outputs"]))
            graph.nodes.append(Node(event["name"], read, made, tuple(event["arguments"])))
        elif kind == "inputs":
            for (name, _, _), value in zip(event["inputs"], self._inputs, strict=True):
                self._names[name] = len(graph.values)
                graph.values.append(value)
        elif kind == "outputs":
            graph.outputs = [self._value(o) for o in event["outputs"]]
        elif kind == "constants":
            for name, array in event["constants"]:
                index = self._value((name, tuple(array.shape), array.dtype))
                if mark := self.marks.find(array):
                    graph.marks[index] = mark
                graph.values[index] = Value(tuple(array.shape), array.dtype, "captured", "a captured array")
                graph.held.add(index)

    def _value(self, described: tuple[str, Sequence[int], mx.Dtype]) -> int:
        name, shape, dtype = described
        index = self._names.get(name)
        if index is None:
            index = self._names[name] = len(self.graph.values)
            self.graph.values.append(Value(tuple(shape), dtype))
        return index


def _listed(places: list[str]) -> str:
    """The first few of some places, and how many more there are."""
    shown = ", ".join(places[:5])
    return shown if len(places) <= 5 else f"{shown} and {len(places) - 5} more"


def _without_arrays(result: object) -> str:
    """The text of the error for a result in which there is no array."""
    if inspect.iscoroutine(result):
        result.close()  # or Python warns that it was never awaited
    if inspect.isgenerator(result) or inspect.iscoroutine(result):
        return (
            f"The step returned a {type(result).__name__}: calling it runs nothing of it. Pass a function that returns "
            "the loss, without `yield` or `async`."
        )
    shown = repr(result) if isinstance(result, (int, float, str, type(None))) else f"a {type(result).__name__}"
    return (
        f"The step returned {shown:.80}, in which there is no array. Return the loss first, as in `return loss`: the "
        "loss is what says which part of the step is evaluated. Arrays are found in lists, tuples and dictionaries."
    )
