"""The inputs of a model's blocks, one block after the other: by the model as it is by now, and as it was before.

Calibration inputs run through blocks whose layers are being quantized. Beside them run the inputs that the unquantized
model would give each block, so that it is known how far those have moved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.devices import computes_on_cpu
from mlx_tune.quantization.learning.kept_arrays import KeptArrays
from mlx_tune.quantization.learning.moments import InputMoments, Seen
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.interception import Step, run_until
from mlx_tune.quantization.models.sites import WalkedModel, widen
from mlx_tune.substitution import Hook, ModuleCall, intercepted

#: Has the weights of a module, or of the whole model in turn, read while a block runs.
Read = Callable[["nn.Module | None"], AbstractContextManager[None]]

Extras = list[tuple[tuple[object, ...], dict[str, object]]]

#: One batch in so many is kept aside to judge each layer on.
_HELD_OUT_EVERY = 8


class Propagation:
    """The inputs of one step after the other, for every batch.

    Made before anything is quantized. Nothing runs twice for one step: what its layers are given is kept until the step
    is left, and takes the place of everything in it that led there.

    Args:
        model: The model, which is quantized step by step meanwhile.
        batches: The batches that it is called with; one in eight judges instead of teaching.
        steps: Its steps, in the order of the forward pass.
        read: Has the weights read of a module, or of the whole model in turn, where they lie on disk.
        layers: The layers that are to be quantized, by path, of each step by its path.
        kept: Holds the inputs of steps and of their layers.
    """

    def __init__(
        self,
        model: WalkedModel,
        batches: Sequence[Batch],
        steps: Sequence[Step],
        read: Read,
        layers: Mapping[str, Mapping[str, nn.Module]],
        kept: KeptArrays,
    ) -> None:
        """Run the unquantized model up to where its blocks begin to follow one another."""
        self._model, self._batches, self._read = model, batches, read
        self._kept = kept
        self._chain = {s.path: s.module for s in steps if s.follows is not None or s.path == _first_of(steps)}
        self._layers, self._looks_ahead = layers, bool(self._chain)
        # Of the current step, and of the same as an unquantized model would run it.
        self._now, self._before = _Side("now"), _Side("before")
        self._extras: dict[str, Extras] = {}
        for step in steps:
            if step.path == _first_of(steps):
                self._start(self._before, step)
        self._extras_before = dict(self._extras)

    def enter(self, step: Step) -> None:
        """Make the inputs of a step ready, if it can be called by itself."""
        if self._now.at != step.path:
            self._start(self._now, step)

    def stages(self, step: Step, modules: Mapping[str, nn.Module]) -> list[list[str]]:
        """Paths of a step's layers in parts: those of one part are given the same inputs, so none of them another's."""
        if self._now.at != step.path:
            return [list(modules)]
        inputs: dict[str, mx.array] = {}  # what each layer is given at first, in the order of the calls
        paths = {id(module): path for path, module in modules.items()}

        def note(call: ModuleCall) -> object:
            if call.inputs is not None:
                inputs.setdefault(paths[id(call.module)], call.inputs)
            return call.run()

        with self._model.running(), intercepted(modules.values(), note):
            self._call(step, self._now, self._extras, 0)  # nothing of it is evaluated
        parts: list[list[str]] = []
        last: mx.array | None = None
        for path, x in inputs.items():
            if x is not last:
                parts.append([])
            parts[-1].append(path)
            last = x
        missing = [path for path in modules if path not in inputs]
        return [*parts[:-1], [*parts[-1], *missing]] if parts else [missing]

    def moments(
        self,
        step: Step,
        modules: Mapping[str, nn.Module],
        others: Mapping[str, nn.Module] = MappingProxyType({}),
        weights: Sequence[tuple[nn.Module, mx.array]] = (),
    ) -> tuple[InputMoments, InputMoments | None]:
        """The moments of the inputs of some of a step's layers.

        Args:
            step: The step.
            modules: The layers by path.
            others: Other layers of the step that are quantized one after another.
            weights: Those of them that have been, and the weights that stand for them.

        Returns:
            Moments to learn from and, where there is more than one batch, to judge on.
        """
        learned = InputMoments(dict(modules))
        held = len(self._batches) > 1
        judged = InputMoments(dict(modules), own_drift=True) if held else None
        every = {**others, **modules}
        with self._model.running(), self._reading(step):
            for i, batch in enumerate(self._batches):
                # The last of each eight judges, and the last of all where there are fewer.
                aside = held and (
                    i % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 or len(self._batches) - 1 == i < _HELD_OUT_EVERY
                )
                into = judged if aside and judged is not None else learned
                if self._now.at != step.path:
                    with intercepted(modules.values(), into_moments(into)), self._ahead(i):
                        batch.inputs.call(self._model.model, through=widen)
                    into.collect()
                    continue
                if self._before.at == step.path and (step.path, i) not in self._before.calls:
                    self._run_before(step, every, i)
                with _standing_in(weights), self._through(self._now, step.path, every, i, modules, into):
                    # Only as much of it is evaluated as the layers' inputs take.
                    self._call(step, self._now, self._extras, i)
                into.collect(self._seen_before(step, modules, i))
        return learned, judged

    def leave(
        self, step: Step, following: Step | None, modules: Mapping[str, nn.Module] = MappingProxyType({})
    ) -> None:
        """Run a step, quantized by now, on every batch, if the next one follows it.

        Args:
            step: The step.
            following: The next one, if it follows this.
            modules: The step's quantized layers by path.
        """
        if following is None or self._now.at != step.path:
            self._forget(step)
            self._now.at = None
            for i in range(len(self._batches)):
                self._kept.discard(("now", i))
            return
        with self._model.running(), self._reading(step):
            for i in range(len(self._batches)):
                if self._before.at == step.path and (step.path, i) not in self._before.calls:
                    self._run_before(step, {}, i)  # nothing in it was quantized
                with self._through(self._now, step.path, modules, i):
                    output = self._call(step, self._now, self._extras, i)
                mx.eval(output)
                self._kept["now", i] = output
        self._forget(step)
        self._now.at = following.path
        self._before.at = following.path if self._before.at == step.path else None

    def _reading(self, step: Step) -> AbstractContextManager[None]:
        """Read the weights that running a step takes, once for all batches where it can be called by itself."""
        return self._read(step.module if self._now.at == step.path else None)

    def _run_before(self, step: Step, modules: Mapping[str, nn.Module], i: int) -> None:
        """Run a step as it was before, and keep what its layers are given and what it hands on."""
        with self._through(self._before, step.path, modules, i, modules):
            output = self._call(step, self._before, self._extras_before, i)
        mx.eval(output)
        self._kept["before", i] = output

    def _seen_before(self, step: Step, modules: Mapping[str, nn.Module], i: int) -> list[Seen] | None:
        if self._before.at != step.path:
            return None
        return [(path, self._kept[slot], None) for path, slot in self._before.calls[step.path, i] if path in modules]

    @contextmanager
    def _ahead(self, i: int) -> Iterator[None]:
        """Keep what layers are given while the unquantized model runs as a whole, instead of running it again later."""
        if not self._looks_ahead or self._before.at != next(iter(self._chain)) or self._now.at is not None:
            yield
            return
        paths = {id(module): path for path, module in self._chain.items()}
        found = 0

        def see(call: ModuleCall) -> object:
            nonlocal found
            path = paths[id(call.module)]
            layers = self._layers.get(path, {})
            with self._through(self._before, path, layers, i, layers):
                output = call.run()
            mx.eval(output)
            found += sum(self._kept[slot].nbytes for slot in {slot for _, slot in self._before.calls[path, i]})
            return output

        with intercepted(self._chain.values(), see):
            yield
        if i == 0 and found * len(self._batches) > self._kept.room_bytes(on_disk=computes_on_cpu()):
            self._looks_ahead = False
            for path in self._chain:
                self._drop(self._before, path, i)

    @contextmanager
    def _through(
        self,
        side: _Side,
        step: str,
        modules: Mapping[str, nn.Module],
        i: int,
        wanted: Mapping[str, nn.Module] = MappingProxyType({}),
        into: InputMoments | None = None,
    ) -> Iterator[None]:
        """Run layers on the inputs that are kept of them, and keep those of the wanted ones, while the block runs."""
        paths = {id(module): path for path, module in modules.items()}
        known: dict[str, list[Hashable]] = {}
        for path, slot in side.calls.get((step, i), []):
            known.setdefault(path, []).append(slot)
        found: list[tuple[str, mx.array]] = []

        def see(call: ModuleCall) -> object:
            path, x = paths[id(call.module)], call.inputs
            if x is None or call.looks_up:  # a lookup is a product with one-hot rows: nothing could be corrected
                return call.run()
            if known.get(path):
                return call.run_on(self._kept[known[path].pop(0)])
            if path in wanted:
                found.append((path, x))
                if into is not None:
                    into.see(call.module, x, call.experts)
            return call.run()

        with intercepted(modules.values(), see):
            yield
        calls, slots = side.calls.setdefault((step, i), []), dict[int, Hashable]()
        if side is self._now and len({id(x) for _, x in found}) > 1:
            return  # one may come from another, which is about to change
        for path, x in found:
            if id(x) not in slots:
                slots[id(x)] = side.name, i, path, len(calls)
                self._kept[slots[id(x)]] = x
            calls.append((path, slots[id(x)]))

    def _forget(self, step: Step) -> None:
        """Let go what the layers of a step were given."""
        for side in (self._now, self._before):
            for i in range(len(self._batches)):
                self._drop(side, step.path, i)

    def _drop(self, side: _Side, step: str, i: int) -> None:
        for _, slot in side.calls.pop((step, i), []):
            self._kept.discard(slot)

    def _start(self, side: _Side, step: Step) -> None:
        """Keep the step's first arguments for every batch, unless only the whole model can call it."""
        if step.calls != 1 or step.like != step.path:
            return
        extras: Extras = []

        def take(call: ModuleCall) -> None:
            if call.inputs is not None:
                mx.eval(call.inputs, call.arguments[1:], call.keywords)
                self._kept[side.name, len(extras)] = call.inputs
                extras.append((call.arguments[1:], call.keywords))

        with self._model.running(), self._read(None):
            for batch in self._batches:
                run_until(partial(batch.inputs.call, self._model.model), step.module, 1, take)
        if len(extras) == len(self._batches):
            self._extras[step.path] = extras
            side.at = step.path

    def _call(self, step: Step, side: _Side, extras: dict[str, Extras], i: int) -> Any:
        arguments, keywords = extras[step.like][i]
        return step.module(self._kept[side.name, i], *arguments, **keywords)


@dataclass
class _Side:
    """One of both runs through the blocks: where it is, and which inputs of layers are kept of it.

    Attributes:
        name: The first part of its keys.
        at: Path of the step whose inputs are kept; None where there is none.
        calls: For each step and batch, the layers in the order of their calls, each with the key of its input.
    """

    name: str
    at: str | None = None
    calls: dict[tuple[str, int], list[tuple[str, Hashable]]] = field(default_factory=dict)


def _first_of(steps: Sequence[Step]) -> str | None:
    """The step with which blocks begin to follow one another."""
    return next((step.like for step in steps if step.follows is not None), None)


def into_moments(moments: InputMoments) -> Hook:
    """The function to intercept layers with, so that moments see what they are given."""

    def see(call: ModuleCall) -> object:
        # A lookup is a product with one-hot rows: no moments that could correct anything.
        if not call.looks_up and call.inputs is not None:
            moments.see(call.module, call.inputs, call.experts)
        return call.run()

    return see


@contextmanager
def _standing_in(weights: Sequence[tuple[nn.Module, mx.array]]) -> Iterator[None]:
    """Let modules have other weights while the block runs."""
    olds = [(module, module["weight"]) for module, _ in weights]
    try:
        for module, weight in weights:
            dict.__setitem__(module, "weight", weight)
        yield
    finally:
        for module, weight in olds:
            dict.__setitem__(module, "weight", weight)
