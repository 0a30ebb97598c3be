"""Running a block so that its gradient runs it again: the one place that deals with MLX's transformations.

A call becomes a function from a flat list of arrays to a flat list of arrays. Its inputs are everything that the
walk found, with the key of the random stream; its outputs are what the block returned, what it wrote into
places that were there before, and the values it marked with `keep`. Everything else it did is done once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import mlx.core as mx

from mlx_tune import graphs
from mlx_tune.checkpointing.captures import Note, Walk, filled
from mlx_tune.checkpointing.effects import take_back
from mlx_tune.checkpointing.keep import Frame
from mlx_tune.checkpointing.randomness import draws_from, thread_stream
from mlx_tune.errors import CheckpointError

_thread = threading.local()
_MISSING = object()


def is_recomputing() -> bool:
    """Tell whether a checkpointed block is being run again for its gradient, on this thread.

    Use it to leave out what must happen once a step, such as counting calls or writing a log line. What a block
    writes into its own attributes, its arguments and the containers it can reach needs no such care: that is undone.

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


def is_differentiable(array: mx.array) -> bool:
    """Whether gradients flow through arrays of this type."""
    return mx.issubdtype(array.dtype, mx.inexact)


def call_checkpointed(
    body: Callable[..., Any],
    owner: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keep: frozenset[str],
) -> Any:
    """Call `body(*args, **kwargs)` so that its gradient runs it again instead of holding what it computed.

    Args:
        body: What to call.
        owner: Where to look for arrays besides the arguments: the module, or the function.
        args: Positional arguments.
        kwargs: Named arguments.
        keep: Names of the marked values to save.

    Returns:
        What the body returns.
    """
    call = _Call(body, owner, args, kwargs, keep)
    outputs = _recomputed(call)
    return call.result(outputs)


class _Outputs:
    """What a run of a block gave: arrays, and where each of them belongs.

    Attributes:
        arrays: What gradients flow through, in order.
        written: Places that were there before and hold something new.
        made: Containers that the block made.
        template: What stands for the returned value.
    """

    def __init__(self, result: Any, before: list[tuple[Note, Any]], seen: set[int]) -> None:
        walk = Walk(seen, is_differentiable)
        self.written: list[Note] = []
        for note, items in before:
            now = note.place.get()
            changed = _changed_keys(items, now)
            templates = []
            for key in changed:
                template = walk.add(now[key])
                if template is not now[key]:
                    now[key] = template
                    templates.append(key)
            if templates:
                self.written.append(Note(note.place, now, templates))
        self.template = walk.add(result)
        self.made = [note for note in walk.notes if note.templates]
        self.arrays = walk.arrays


def _changed_keys(old: Any, new: Any) -> list[Any]:
    if isinstance(new, dict):
        if len(old) == len(new) and all(map(is_, old.values(), new.values())):
            return []
        return [key for key, value in new.items() if old.get(key, _MISSING) is not value]
    return [i for i, value in enumerate(new) if i >= len(old) or old[i] is not value]


class _Call:
    """One call of a checkpointed block: run once when it is made, and again from the same state for each gradient."""

    def __init__(
        self,
        body: Callable[..., Any],
        owner: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep: frozenset[str],
    ) -> None:
        walk = Walk()
        self.body = body
        walk.add(owner)
        self.args = walk.add(args)
        self.kwargs = [(name, walk.add(value)) for name, value in kwargs.items()]
        self.notes = walk.notes
        self.seen = walk.seen
        self.keep = keep
        self.marks = 0
        self.arrays = [*walk.arrays, thread_stream()[0]]
        self.differentiable = [i for i, array in enumerate(self.arrays) if is_differentiable(array)]
        self.shapes: list[tuple[tuple[int, ...], mx.Dtype]] = []
        self.outputs: _Outputs | None = None
        # Only for the first run, dropped with it: these hold arrays.
        self._first: tuple[tuple[Any, ...], dict[str, Any], list[Any]] | None = (args, kwargs, walk.before)

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        """Run the block on these arrays; the first time as it stands, which is what they were taken from."""
        if self._first is not None:
            return self._run_first()
        return self.run_again(list(arrays), Frame(self.keep))

    def _run_first(self) -> list[mx.array]:
        assert self._first is not None
        args, kwargs, before = self._first
        self._first = None
        with Frame(self.keep) as frame:
            result = self.body(*args, **kwargs)
        missed = sorted(self.keep - frame.seen)
        if missed:
            marked = ", ".join(map(repr, sorted(frame.seen))) or "nothing"
            raise CheckpointError(
                f"keep={missed} names no value that {_name(self.body)} marks; it marked {marked}. "
                "Mark values inside the block with mlx_tune.keep(array, name)."
            )
        self.outputs = _Outputs(result, list(zip(self.notes, before, strict=True)), self.seen)
        arrays = [*self.outputs.arrays, *frame.values]
        self.outputs.arrays = []
        self.marks = len(frame.values)
        self.shapes = _shapes(arrays)
        return arrays or _nothing()

    def run_again(self, arrays: list[mx.array], frame: Frame) -> list[mx.array]:
        """Run the block from the state it had at first, on these arrays, and leave no trace of it."""
        # Integers, keys and booleans have no gradient, and some operations raise when they are asked for one.
        # Fresh objects throughout: `x += y` in a block writes into the object itself.
        arrays = [a if is_differentiable(a) else mx.stop_gradient(a) for a in arrays]
        *arrays, key = arrays
        notes = self.notes
        before = [note.place.get() for note in notes]
        installed = [note.filled(arrays) for note in notes]
        _thread.depth = getattr(_thread, "depth", 0) + 1
        try:
            for note, items in zip(notes, installed, strict=True):
                note.place.put(items)
            with draws_from(key), frame:
                result = self.body(
                    *filled(self.args, arrays), **{name: filled(value, arrays) for name, value in self.kwargs}
                )
            outputs = _Outputs(result, list(zip(notes, installed, strict=True)), self.seen)
        finally:
            _thread.depth -= 1
            for note, items, start in zip(notes, before, installed, strict=True):
                take_back(note.place, items, start)
        found = [*outputs.arrays, *frame.values]
        shapes = _shapes(found)
        if shapes != self.shapes:
            raise CheckpointError(
                f"{_name(self.body)} did something else when it was run again for its gradient: it gave "
                f"{_described(shapes)} where the first run gave {_described(self.shapes)}. A checkpointed block must "
                "do the same each time: look for Python's or NumPy's random numbers, a counter or a clock in it."
            )
        return found or _nothing()

    def gradients(self, arrays: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        """The gradient of every input: the block is run again as soon as its outputs' gradients are there.

        `mx.checkpoint` lets the second run begin once the outputs are there, and leaves it to the order in which
        MLX happens to walk the graph that many blocks do not run again at once. Waiting for the cotangents as well
        makes sure of it. On a chain of blocks both have the same peak.
        """
        tied = mx.depends(arrays, [*outputs, *cotangents])
        ends = len(self.shapes) - self.marks
        if (ends < 1 and not self.marks) or not self.differentiable:
            return [mx.zeros_like(array) for array in arrays]
        saved = outputs[ends:]
        kept = [array for array in saved if is_differentiable(array)]

        def again(*primals: mx.array) -> list[mx.array]:
            inputs = list(tied)
            for index, primal in zip(self.differentiable, primals, strict=False):
                inputs[index] = primal
            rest = iter(primals[len(self.differentiable) :])
            frame = Frame(self.keep, [next(rest) if is_differentiable(a) else a for a in saved])
            found = self.run_again(inputs, frame)
            links = [array for array in found[ends:] if is_differentiable(array)]
            # mx.vjp skips outputs of stop_gradient and gives their cotangents to the next: make them others.
            return [*links, *(mx.depends(found[:ends], []) if ends else [])]

        wanted = [c for c in cotangents[ends:] if is_differentiable(c)] + cotangents[:ends]
        _, found = mx.vjp(again, [*(tied[i] for i in self.differentiable), *kept], wanted)
        of = dict(zip(self.differentiable, found, strict=False))
        return [of[i] if i in of else mx.zeros_like(array) for i, array in enumerate(arrays)]

    def result(self, arrays: Sequence[mx.array]) -> Any:
        """What the first run returned and wrote, with these arrays as its outputs."""
        outputs = self.outputs
        self.outputs = None
        assert outputs is not None
        held = list(arrays)
        for note in (*outputs.written, *outputs.made):
            note.place.put(note.filled(held))
        return filled(outputs.template, held)


def _recomputed(call: _Call) -> list[mx.array]:
    """Run a call under MLX's transformations."""
    arrays = call.arrays
    call.arrays = []
    if graphs.is_tracing():
        return graphs.traced_checkpoint(call, arrays)
    forward: Any = mx.custom_function(lambda held: call(*held))
    forward.vjp(call.gradients)
    return forward(arrays)


def _nothing() -> list[mx.array]:
    """MLX's custom functions must return something."""
    return [mx.array(0.0)]


def _shapes(arrays: list[mx.array]) -> list[tuple[tuple[int, ...], mx.Dtype]]:
    return [(tuple(a.shape), a.dtype) for a in arrays]


def _name(body: Callable[..., Any]) -> str:
    owner = getattr(body, "__self__", None)
    return type(owner).__name__ if owner is not None else getattr(body, "__qualname__", repr(body))


def _described(shapes: list[tuple[tuple[int, ...], mx.Dtype]]) -> str:
    return ", ".join(f"{str(dtype).rpartition('.')[2]}{list(shape)}" for shape, dtype in shapes) or "nothing"
