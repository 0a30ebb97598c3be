"""Running a block so that its gradient runs it again: the one place that deals with MLX's transformations.

A call becomes a function from a flat list of arrays to a flat list of arrays. Its inputs are everything that the
walk found, with the key of the random stream; its outputs are what the block returned, what it wrote into
places that were there before, and the values it marked with `keep`. Everything else it did is done once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx

from mlx_tune.checkpointing.block.constants import Refusals, untrained
from mlx_tune.checkpointing.block.keep import Frame, with_gradient
from mlx_tune.checkpointing.block.randomness import draws_from, thread_stream
from mlx_tune.checkpointing.block.side_effects import Rewound
from mlx_tune.checkpointing.block.weights_first import WeightsFirst, tied
from mlx_tune.errors import CheckpointError
from mlx_tune.graphs.tracing.recomputation import is_differentiable, is_tracing, traced_checkpoint
from mlx_tune.reach.container_notes import Note, fill
from mlx_tune.reach.places import Held
from mlx_tune.reach.walk import Walk
from mlx_tune.units import dtype_name

_thread = threading.local()
_MISSING = object()


def is_recomputing() -> bool:
    """Tell whether a checkpointed block is being run again for its gradient, on this thread.

    Use it to leave out what must happen once a step, such as counting calls or writing a log line. Values that a block
    writes into its own attributes, its arguments and the containers it can reach need no such care: that is undone.

    Returns:
        True in a run for the gradient; false in the first run and anywhere else.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx_tune as mt
        >>> runs = []
        >>> def square(x):
        ...     runs.append(mt.is_recomputing()) if not mt.is_recomputing() else print("again")
        ...     return x * x
        >>> gradient = mx.grad(mt.checkpoint(square))(mx.array(3.0))
        again
        >>> runs, mt.is_recomputing()
        ([False], False)
    """
    return getattr(_thread, "depth", 0) > 0


@contextmanager
def plainly() -> Iterator[None]:
    """Call what is checkpointed as it is, on this thread."""
    outer = getattr(_thread, "plain", False)
    _thread.plain = True
    try:
        yield
    finally:
        _thread.plain = outer


def is_plain() -> bool:
    """True where what is checkpointed is called as it is, on this thread."""
    return getattr(_thread, "plain", False)


@contextmanager
def runs_again() -> Iterator[set[int]]:
    """Collect what is run again for its gradient on this thread, by identity."""
    outer = getattr(_thread, "again", None)
    found: set[int] = set()
    _thread.again = found
    try:
        yield found
    finally:
        _thread.again = outer


def call_checkpointed(
    body: Callable[..., object],
    owner: object,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    keep: frozenset[str],
    refusals: Refusals,
) -> Any:
    """Call `body(*args, **kwargs)` so that its gradient runs it again instead of holding what it computed.

    Args:
        body: The function to call.
        owner: Where to look for arrays besides the arguments: the module, or the function.
        args: Positional arguments.
        kwargs: Named arguments.
        keep: Names of the marked values to save.
        refusals: The findings of earlier calls.

    Returns:
        The value that the body returns.
    """
    if is_plain():
        return body(*args, **kwargs)
    call = Call(body, owner, args, kwargs, keep, refusals)
    return call.result(traced_checkpoint(call, call.inputs(), waits=True) if is_tracing() else recomputed(call))


class _Outputs:
    """The outputs of a run of a block: arrays, and where each of them belongs.

    Attributes:
        arrays: Arrays that gradients flow through, in order.
        written: Places that were there before and hold new arrays, with what they hold now.
        changed: The indices of the places that hold anything new.
        made: Containers that the block made.
        template: The stand-in for the returned value.
    """

    def __init__(self, result: object, notes: list[Note], started: list[object], seen: dict[int, object]) -> None:
        walk = Walk(seen, is_differentiable, made=True)
        self.written: list[tuple[Held, Any]] = []
        self.changed: set[int] = set()
        for i, note in enumerate(notes):
            if not note.place.same(started[i]):
                self.changed.add(i)
                self._add_changes(walk, note.place, started[i])
        self.template = walk.add(result)
        self.made = [note for note in walk.notes if note.marks]
        self.arrays = walk.arrays

    def _add_changes(self, walk: Walk, place: Held, old: object) -> None:
        now = place.get()
        found = False
        for key in _changed_keys(old, now):
            template = walk.add(now[key])
            if template is not now[key]:
                now[key] = template
                found = True
        if found:
            self.written.append((place, now))

    def put(self, arrays: list[mx.array]) -> object:
        """Put these arrays where they belong, and return the value with them in it."""
        for place, items in self.written:
            if isinstance(items, dict):
                place.put({key: fill(value, arrays) for key, value in items.items()})
            else:
                place.put([fill(value, arrays) for value in items])
        for note in self.made:
            note.place.put(note.filled(arrays))
        return fill(self.template, arrays)


def _changed_keys(old: Any, new: Any) -> list[object]:
    if isinstance(new, dict):
        return [key for key, value in new.items() if old.get(key, _MISSING) is not value]
    return [i for i, value in enumerate(new) if i >= len(old) or old[i] is not value]


class Call:
    """One call of a checkpointed block: run once when it is made, and again from the same state for each gradient."""

    def __init__(
        self,
        body: Callable[..., object],
        owner: object,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        keep: frozenset[str],
        refusals: Refusals,
    ) -> None:
        walk = Walk()
        walk.add(owner)
        found_before, owned = len(walk.iterators), len(walk.arrays)
        self.body = body
        self.owner = id(owner)
        self.name = getattr(owner, "__qualname__", None) or type(owner).__name__
        self.args = walk.add(args)
        self.kwargs = [(name, walk.add(value)) for name, value in kwargs.items()]
        self.used_up = [type(value).__name__ for value, _ in walk.iterators[found_before:]]
        self.notes = walk.notes
        self.seen = walk.seen
        self.keep = keep
        self.refusals = refusals
        self.marks = 0
        self.runs = 0  # how often it was run again to its end
        self.reached: set[int] = set()  # the outputs that have a gradient, while one is taken
        self.arrays = [*walk.arrays, thread_stream()[0]]
        self.differentiable = {i for i, array in enumerate(self.arrays) if is_differentiable(array)}
        # In the run for the gradient of an enclosing checkpoint every gradient is asked for, frozen weights' too.
        others = set() if is_recomputing() else self.differentiable - untrained(self.notes)
        self.weights_first = WeightsFirst({i for i in others if i >= owned}, others)
        self.stream = mx.default_stream(mx.default_device())
        self.shapes: list[tuple[tuple[int, ...], mx.Dtype]] = []
        self.outputs: _Outputs | None = None
        # Only for the first run, dropped with it: these hold arrays.
        self._first: tuple[tuple[object, ...], dict[str, object]] | None = (args, kwargs)

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Run the block on these arrays; the first time as it stands, which is what they were taken from."""
        if self._first is not None:
            return self._run_first()
        return self.run_again(list(arrays), self.differentiable, Frame(self.keep))

    def inputs(self) -> list[mx.array]:
        """The arrays that it is called on, which it lets go of."""
        arrays, self.arrays = self.arrays, []
        return self.weights_first.around(arrays)

    def _run_first(self) -> list[mx.array]:
        assert self._first is not None
        args, kwargs = self._first
        self._first = None
        with Frame(self.keep) as frame:
            result = self.first(args, kwargs)
        missed = sorted(self.keep - frame.seen)
        if missed:
            marked = ", ".join(map(repr, sorted(frame.seen))) or "nothing"
            raise CheckpointError(
                f"keep={missed} names no value that {self.name} marks; it marked {marked}. "
                "Mark values inside the block with mlx_tune.keep(array, name)."
            )
        self.outputs = _Outputs(result, self.notes, [note.items for note in self.notes], self.seen)
        for note in self.notes:
            note.forget()
        arrays = [*self.outputs.arrays, *frame.values]
        self.outputs.arrays = []
        self.marks = len(frame.values)
        self.shapes = shapes_of(arrays)
        return arrays or nothing()

    def first(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """The value of the first run."""
        return self.body(*args, **kwargs)

    def run_again(self, arrays: list[mx.array], moving: set[int], frame: Frame) -> list[mx.array]:
        """Run the block from the state it had at first, on these arrays, and leave no trace of it.

        Args:
            arrays: The inputs.
            moving: The indices of those that have gradients.
            frame: Where marks go.
        """
        if self.used_up:
            raise CheckpointError(
                f"{self.name} was given an iterator ({self.used_up[0]}) as an argument, and cannot be run again "
                "for its gradient: the first run has used it up. Pass a list or a tuple."
            )
        # Integers, keys and booleans have no gradient, and some operations raise when they are asked for one.
        # Fresh objects throughout: `x += y` in a block writes into the object itself.
        arrays = [array if i in moving else mx.stop_gradient(array) for i, array in enumerate(arrays)]
        *arrays, key = arrays
        if (watching := getattr(_thread, "again", None)) is not None:
            watching.add(self.owner)
        here = mx.default_stream(mx.default_device())
        _thread.depth = getattr(_thread, "depth", 0) + 1
        try:
            with (
                Rewound(self.notes, arrays) as rewound,
                draws_from(key),
                frame,
                nullcontext() if here == self.stream else mx.stream(self.stream),
            ):
                result = self.body(
                    *fill(self.args, arrays), **{name: fill(value, arrays) for name, value in self.kwargs}
                )
                outputs = _Outputs(result, self.notes, rewound.started, self.seen)
                rewound.changed = outputs.changed
        finally:
            _thread.depth -= 1
        found = [*outputs.arrays, *frame.values]
        shapes, before = shapes_of(found), self.expected(arrays)
        if shapes != before:
            raise CheckpointError(
                f"{self.name} did something else when it was run again for its gradient: it gave "
                f"{_described(shapes)} where the first run gave {_described(before)}. A checkpointed block must "
                "do the same each time: look for Python's or NumPy's random numbers, a counter or a clock in it."
            )
        return found or nothing()

    def expected(self, arrays: list[mx.array]) -> list[tuple[tuple[int, ...], mx.Dtype]]:
        """The shapes and dtypes that a run on some arrays gives: those of the first run."""
        return self.shapes

    def watched(self, outputs: list[mx.array]) -> list[mx.array]:
        """The outputs that the block gave, each noting when a gradient reaches it.

        MLX hands a zero for every output that no gradient reaches, such as running statistics. A zero is not the same
        as none: times an infinite derivative it is not a number, and equal zeros of many blocks make `mx.compile` lose
        an operation and raise ("_Map_base::at"), where the plain model has no such operations at all.
        """
        ends = len(self.shapes) - self.marks
        return [_watched(array, i, self.reached) for i, array in enumerate(outputs[:ends])] if ends > 1 else outputs

    def gradients(self, arrays: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        """The gradient of every input, zero for those that have none."""
        ends = len(self.shapes) - self.marks
        reached = sorted(self.reached) if ends > 1 and not is_tracing() else list(range(ends))
        self.reached.clear()
        wanted = [c for c in cotangents[ends : len(self.shapes)] if is_differentiable(c)]
        wanted += [cotangents[i] for i in reached]
        if not wanted or not self.differentiable:
            return [mx.zeros_like(array) for array in arrays]

        def of(moving: set[int]) -> list[mx.array] | Exception:
            runs = self.runs
            try:
                return self.vjp(moving, reached, arrays, wanted, outputs)
            except (ValueError, RuntimeError) as error:
                if self.runs == runs:
                    raise  # the block's own
                return error

        found, ignored = self.refusals.without_constants(arrays, self.differentiable, self.notes, of)
        if isinstance(found, Exception):
            found.add_note(
                f"{self.name} is checkpointed, so it is asked for the gradients of all its floating point "
                "inputs. Pass one that needs none, such as a mask, through mx.stop_gradient."
            )
            raise found
        # Nobody takes the gradient of a constant. Where somebody does after all, it must not look like one.
        found = [mx.full(a.shape, math.nan, a.dtype) if i in ignored else found[i] for i, a in enumerate(arrays)]
        return found if is_tracing() else self.weights_first.given_out(found, ignored)

    def vjp(
        self,
        moving: set[int],
        reached: list[int],
        arrays: list[mx.array],
        wanted: list[mx.array],
        outputs: list[mx.array],
    ) -> list[mx.array]:
        """The gradients of some inputs through the outputs that have one, zero for the other inputs.

        The block is run again as soon as its outputs' gradients are there.
        `mx.checkpoint` lets the second run begin once the outputs are there, and leaves it to the order in which
        MLX happens to walk the graph that many blocks do not run again at once. Waiting for the cotangents as well
        makes sure of it. On a chain of blocks both have the same peak.
        """
        ends = len(self.shapes) - self.marks
        # Each a value of its own. Equal ones, such as the zeros of arrays that one call wrote and the next did not use,
        # go through equal operations in many blocks, of which `mx.compile` loses some ("_Map_base::at").
        wanted = mx.depends(wanted, [])
        inputs = tied(arrays, [*outputs, *wanted])

        def again(*primals: mx.array) -> list[mx.array]:
            saved = [a if is_differentiable(a) else mx.stop_gradient(a) for a in primals[len(inputs) :]]
            found = self.run_again(list(primals[: len(inputs)]), moving, Frame(self.keep, saved))
            self.runs += 1
            links = [array for array in found[ends:] if is_differentiable(array)]
            # mx.vjp skips outputs of stop_gradient and gives their cotangents to the next: make them others.
            return [*links, *(mx.depends([found[i] for i in reached], []) if reached else [])]

        # What has no gradient is among the primals as well: MLX walks the graph behind everything else, and behind
        # these is all that has been computed so far.
        return mx.vjp(again, [*inputs, *outputs[ends:]], wanted)[1][: len(inputs)]

    def result(self, arrays: Sequence[mx.array]) -> object:
        """The results and writes of the first run, with these arrays as its outputs."""
        outputs = self.outputs
        self.outputs = None
        assert outputs is not None
        return outputs.put(list(arrays))


def recomputed(call: Call) -> list[mx.array]:
    """Run a call on its inputs, with the gradients that it gives itself."""
    forward: Any = mx.custom_function(lambda held: call(*held))
    forward.vjp(call.gradients)
    return call.watched(forward(call.inputs()))


def _watched(output: mx.array, index: int, reached: set[int]) -> mx.array:
    """The output, adding its index to `reached` when its gradient comes.

    It must not hold the call: that holds the containers that the block writes to, one of which holds this output
    until somebody evaluates it, and Python's garbage collector does not see into MLX's graph.
    """

    def note(cotangent: mx.array) -> mx.array:
        reached.add(index)
        return cotangent

    return with_gradient(note)(output)


def nothing() -> list[mx.array]:
    """MLX's custom functions must return something."""
    return [mx.array(0.0)]


def shapes_of(arrays: list[mx.array]) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    return [(a.shape, a.dtype) for a in arrays]


def _described(shapes: list[tuple[tuple[int, ...], mx.Dtype]]) -> str:
    return ", ".join(f"{dtype_name(dtype)}{list(shape)}" for shape, dtype in shapes) or "nothing"
