"""The inputs of a model's blocks, one block after the other: by the model as it is by now, and as it was before.

Calibration inputs run through blocks whose layers are being quantized. Beside them run the inputs that the unquantized
model would give each block, so that it is known how far those have moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.quantization.learning.moments import InputMoments, Seen
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.interception import Step, run_until
from mlx_tune.quantization.models.sites import WalkedModel, widen
from mlx_tune.substitution import Hook, ModuleCall, intercepted

Extras = list[tuple[tuple[object, ...], dict[str, object]]]

#: One batch in so many is kept aside to judge each layer on.
_HELD_OUT_EVERY = 8


class Propagation:
    """The inputs of one step after the other, for every batch.

    Made before anything is quantized.

    Args:
        model: The model, which is quantized step by step meanwhile.
        batches: The batches that it is called with; one in eight judges instead of teaching.
        steps: Its steps, in the order of the forward pass.
    """

    def __init__(self, model: WalkedModel, batches: Sequence[Batch], steps: Sequence[Step]) -> None:
        """Run the unquantized model up to where its blocks begin to follow one another."""
        self._model, self._batches = model, batches
        self._now: list[mx.array] | None = None  # the current step's first arguments
        self._now_at: str | None = None
        self._extras: dict[str, Extras] = {}
        self._before: list[mx.array] | None = None  # the same as an unquantized model would give them
        self._before_at: str | None = None
        first = next((step.like for step in steps if step.follows is not None), None)
        for step in steps:
            if step.path == first:
                self._before, self._before_at = self._enter(step), step.path
        self._extras_before = dict(self._extras)

    def enter(self, step: Step) -> None:
        """Make the inputs of a step ready, if it can be called by itself."""
        if self._now_at != step.path:
            self._now, self._now_at = self._enter(step), step.path

    def stages(self, step: Step, modules: Mapping[str, nn.Module]) -> list[list[str]]:
        """Paths of a step's layers in parts: those of one part are given the same inputs, so none of them another's."""
        if self._now is None:
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
        weights: Sequence[tuple[nn.Module, mx.array]] = (),
        *,
        last: bool = True,
    ) -> tuple[InputMoments, InputMoments | None]:
        """The moments of the inputs of a step's layers.

        Args:
            step: The step.
            modules: The layers by path.
            weights: Other layers of the step and the weights that stand for them once they are quantized.
            last: True where the step as it was before is not needed again.

        Returns:
            Moments to learn from and, where there is more than one batch, to judge on.
        """
        learned = InputMoments(dict(modules))
        held = len(self._batches) > 1
        judged = InputMoments(dict(modules), own_drift=True) if held else None
        with self._model.running():
            for i, batch in enumerate(self._batches):
                # The last of each eight judges, and the last of all where there are fewer.
                aside = held and (
                    i % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 or len(self._batches) - 1 == i < _HELD_OUT_EVERY
                )
                into = judged if aside and judged is not None else learned
                before: list[Seen] | None = None
                if self._before is not None and self._now is not None and self._before_at == step.path:
                    with intercepted(modules.values(), into_moments(into)):
                        output = self._call(step, self._before, self._extras_before, i)
                    before = into.take()
                    if last:
                        mx.eval(output, [x for _, x, _ in before])
                        self._before[i] = output
                with _standing_in(weights), intercepted(modules.values(), into_moments(into)):
                    # Only as much of it is evaluated as the layers' inputs take.
                    if self._now is not None:
                        self._call(step, self._now, self._extras, i)
                    else:
                        batch.inputs.call(self._model.model, through=widen)
                    into.collect(before)
        if last and self._before_at == step.path:
            self._before_at = None  # until `leave` says of what these are the inputs
        return learned, judged

    def leave(self, step: Step, following: Step | None) -> None:
        """Run a step, quantized by now, on every batch, if the next one follows it."""
        if following is None or self._now is None:
            self._now = self._now_at = None
            return
        with self._model.running():
            if self._before is not None and self._before_at == step.path:  # nothing in it was quantized
                for i in range(len(self._before)):
                    self._before[i] = self._call(step, self._before, self._extras_before, i)
                    mx.eval(self._before[i])
            for i in range(len(self._now)):
                self._now[i] = self._call(step, self._now, self._extras, i)  # the input is not needed any more
                mx.eval(self._now[i])
        self._now_at = following.path
        self._before_at = following.path if self._before is not None else None

    def _enter(self, step: Step) -> list[mx.array] | None:
        """The step's first arguments for every batch, or None where only the whole model can call it."""
        if step.calls != 1 or step.like != step.path:
            return None
        states: list[mx.array] = []
        extras: Extras = []

        def take(call: ModuleCall) -> None:
            if call.inputs is not None:
                states.append(call.inputs)
                extras.append((call.arguments[1:], call.keywords))

        with self._model.running():
            for batch in self._batches:
                run_until(partial(batch.inputs.call, self._model.model), step.module, 1, take)
                mx.eval(states[-1:], extras[-1:])
        if len(states) != len(self._batches):
            return None
        self._extras[step.path] = extras
        return states

    @staticmethod
    def _call(step: Step, inputs: list[mx.array], extras: dict[str, Extras], i: int) -> Any:
        arguments, keywords = extras[step.like][i]
        return step.module(inputs[i], *arguments, **keywords)


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
