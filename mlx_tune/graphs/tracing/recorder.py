"""The record of a traced step, from the placeholders that go in to what MLX's exporter reports."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_tune.errors import TraceError
from mlx_tune.graphs.arguments import ArraySpec, Leaf, argument_arrays, with_arrays
from mlx_tune.graphs.graph import CompiledCall, Graph, Node, Value
from mlx_tune.graphs.tracing.built_graph import BuiltGraph, made_by_operations
from mlx_tune.graphs.tracing.custom_gradients import Marks
from mlx_tune.interrupts import interruptible
from mlx_tune.trees import StateArray, state_arrays


class Recorder:
    """Takes what MLX's exporter reports and turns it into a graph.

    Attributes:
        graph: The exporter's report, in which equal operations are one.
        built: The same trace as the step built it.
        compiled_calls: The arrays that compiled functions read and made, by the names of `built`.
    """

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
        marks: Marks,
        compiled_calls: Sequence[tuple[Sequence[mx.array], Sequence[mx.array]]],
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
        self.marks = marks

        def flat(*tracers: mx.array) -> list[mx.array]:
            # Writing into an array in place gives the same object another value: these are the ones before.
            inputs = [copy.copy(tracer) for tracer in tracers]
            place = {key: tracers[i] for key, i in unique.items()}
            for slot in slots:
                slot.put(place[id(slot.array)])
            with interruptible():
                result = step(*with_arrays(args, (tracers[i] for i in positions)))
            outputs = argument_arrays(result)
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
            around = [array for call in compiled_calls for side in call for array in side]
            self.built = BuiltGraph(inputs, everything, around)
            names = iter(self.built.others)
            self.compiled_calls = [
                CompiledCall(*(tuple(name for _ in side if (name := next(names)) is not None) for side in call))
                for call in compiled_calls
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
