"""GPTQ on a model: block after block, each given what the quantized ones before it hand on.

Beside them run the inputs that each block would be given by unquantized ones, so that a block's layers make up for some
of what was lost before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.quantization.affine import quantize_affine
from mlx_tune.quantization.arithmetic import evaluation_mode, float32_arithmetic, widen
from mlx_tune.quantization.batches import Batch, in_parts
from mlx_tune.quantization.capture import Step, forward_steps, intercepted, model_arguments, run_until
from mlx_tune.quantization.dense import dense_twin, dequantize_arrays
from mlx_tune.quantization.drift import Drift, corrected, drifted_output_error
from mlx_tune.quantization.gptq import output_error, quantize_gptq, shrinkage_for
from mlx_tune.quantization.lazy import number, read_array
from mlx_tune.quantization.moments import Call, InputMoments
from mlx_tune.quantization.plan import LayerPlan
from mlx_tune.quantization.search import Effort

Arrays = tuple[mx.array, mx.array, mx.array]
Extras = list[tuple[tuple[Any, ...], dict[str, Any]]]

#: Tokens that run through a block at once, however large the batches are.
_PART_TOKENS = 4096

#: One part in so many is kept aside to judge each layer on.
_HELD_OUT_EVERY = 8

#: How much the relative error of a tied embedding's rows counts beside that of its logits.
LOOKUP_SHARE = 1.0


@dataclass(frozen=True)
class CalibratedLayer:
    """What became of one layer.

    Attributes:
        path: Where it stands first.
        method: "gptq", or "optimal" where that was no worse.
        output_error: Squared error of its outputs over their squares, on calibration that it did not learn from where
            there is more than one batch; None where it was given no inputs. Where the blocks follow one another, its
            outputs are held against those of the unquantized model, so that what its inputs lost before it counts.
        optimal_output_error: The same for "optimal".
        note: Why it fell back, if it did.
    """

    path: str
    method: str
    output_error: float | None
    optimal_output_error: float | None
    note: str | None = None


def gptq_model(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    calibration: Sequence[Batch],
    *,
    install: Callable[[LayerPlan, Arrays], None],
    effort: Effort = "fast",
    progress: bool = False,
) -> list[CalibratedLayer]:
    """Quantize the planned layers of a model with GPTQ.

    A block's inputs come from the quantized blocks before it. Where the model hands a block's output straight to the
    next, as nearly all do, each batch runs through each block three times: as the unquantized model would, for learning
    from, and on to the next. Where it does not, the model is run from its start for every block, and nothing is known
    of how far inputs have moved. A tied embedding goes first, by what the head is given: the blocks then learn from
    its lookups.

    Args:
        model: The model; `install` changes it.
        layers: Affine layers of its plan.
        calibration: Batches. Those of tokens are cut into parts of some thousand tokens; one part in eight judges
            instead of teaching.
        install: Puts a layer's packed weights into the model.
        effort: "fast" or "best".
        progress: Show a progress line.

    Returns:
        What became of each layer, in the plan's order.

    Raises:
        QuantizationError: There are no batches, or inputs are not finite.

    Examples:
        >>> from mlx_tune.quantization.apply import install
        >>> from mlx_tune.quantization.batches import read_batches
        >>> from mlx_tune.quantization.layout import plan_quantization
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> mix = mx.random.normal((8, 64))  # real inputs are correlated, too
        >>> batches = read_batches([mx.random.normal((32, 8)) @ mix for _ in range(8)], "calibration")
        >>> layers = plan_quantization(model, 3, 64).layers
        >>> [layer.method for layer in gptq_model(model, layers, batches, install=install)]
        ['gptq', 'gptq']
    """
    if not calibration:
        raise QuantizationError("GPTQ learns from batches: calibration is empty.")
    with progress_bar("gptq", len(layers), enabled=progress) as bar:
        run = _Run(model, list(layers), in_parts(calibration, _PART_TOKENS), install, effort, bar)
        done = run.all()
    return [done[layer.path] for layer in layers]


class _Run:
    """One pass over a model."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[LayerPlan],
        batches: list[Batch],
        install: Callable[[LayerPlan, Arrays], None],
        effort: Effort,
        bar: Bar,
    ) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self._install, self._effort, self._bar = install, effort, bar
        self._states: list[mx.array] = []
        self._states_of: str | None = None  # the step whose outputs `_states` are
        self._extras: dict[str, Extras] = {}
        # What the step at this path would be given by an unquantized model, and the further arguments for all of them.
        self._before: list[mx.array] = []
        self._before_at: str | None = None
        self._extras_before: dict[str, Extras] = {}

    def all(self) -> dict[str, CalibratedLayer]:
        done: dict[str, CalibratedLayer] = {}
        modules = {path: layer.module for layer in self._layers for path in layer.paths}
        with self._running():
            steps = forward_steps(self._model, self._batches[0], list(modules.items()))
        first = next((s.like for s in steps if s.follows is not None), None)
        for step in steps:
            if step.path == first:
                self._before, self._extras_before = self._enter(step) or [], dict(self._extras)
                self._before_at = step.path if self._before else None
        heads = [layer for layer in self._layers if isinstance(layer.module, nn.Embedding)]
        for layer in heads:
            done[layer.path] = self._embedding(layer, steps)
        for i, step in enumerate(steps):
            mine = [x for x in self._layers if x.path not in done and self._belongs(x, step)]
            following = steps[i + 1] if i + 1 < len(steps) and steps[i + 1].follows == step.path else None
            if not mine and following is None and step.follows is None:
                continue
            inputs = self._enter(step)
            if mine:
                learned, judged = self._moments(step, mine, inputs)
                for layer in mine:
                    done[layer.path] = self._solve(layer, learned, judged)
            if following is not None:
                self._advance(step, inputs)
                if self._before_at == step.path:
                    if not mine:
                        with self._running():
                            self._before = [self._as_before(step, i) for i in range(len(self._before))]
                    self._before_at = following.path
        for layer in self._layers:
            if layer.path not in done:
                done[layer.path] = self._fall_back(layer, "no calibration input reached it")
        return done

    @staticmethod
    def _belongs(layer: LayerPlan, step: Step) -> bool:
        return any(path == step.path or path.startswith(f"{step.path}.") for path in layer.paths)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Evaluation mode and, where the device is a CPU, float32, which alone is fast there."""
        with evaluation_mode(self._model):
            if mx.default_device() == mx.Device(mx.cpu):
                with float32_arithmetic(self._model):
                    yield
            else:
                yield

    def _enter(self, step: Step) -> list[mx.array] | None:
        """The step's first arguments for every batch, or None where only the whole model can call it."""
        if step.follows is not None and step.follows == self._states_of:
            return self._states
        if step.calls != 1 or step.like != step.path:
            return None
        states: list[mx.array] = []
        extras: Extras = []

        def take(module: nn.Module, method: str, run: Any, arguments: Any, keywords: Any) -> Any:
            if arguments and isinstance(arguments[0], mx.array):
                states.append(arguments[0])
                extras.append((arguments[1:], keywords))
            return None

        with self._running():
            for batch in self._batches:
                run_until(self._model, batch, step.module, 1, take)
                mx.eval(states[-1:], extras[-1:])
        if len(states) != len(self._batches):
            return None
        self._extras[step.path] = extras
        return states

    def _call(self, step: Step, inputs: list[mx.array], i: int) -> Any:
        arguments, keywords = self._extras[step.like][i]
        return step.module(inputs[i], *arguments, **keywords)

    def _as_before(self, step: Step, i: int) -> mx.array:
        """Run a step that is not quantized yet on what an unquantized model would give it."""
        arguments, keywords = self._extras_before[step.like][i]
        output: mx.array = step.module(self._before[i], *arguments, **keywords)
        mx.eval(output)
        return output

    def _moments(
        self, step: Step, layers: list[LayerPlan], inputs: list[mx.array] | None
    ) -> tuple[InputMoments, InputMoments | None]:
        modules = {layer.path: layer.module for layer in layers}
        learned = InputMoments(modules)
        held = len(self._batches) > 1
        judged = InputMoments(modules, own_drift=True) if held else None
        known = inputs is not None and self._before_at == step.path
        for i, batch in enumerate(self._batches):
            # The last of each eight judges, and the last of all where there are fewer.
            aside = held and (
                i % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 or len(self._batches) - 1 == i < _HELD_OUT_EVERY
            )
            into = judged if aside and judged is not None else learned
            before: list[Call] | None = None
            if known:
                with self._running(), intercepted(modules.values(), into.hook()):
                    self._before[i] = self._as_before(step, i)
                before = into.take()
            with self._running(), intercepted(modules.values(), into.hook()):
                if inputs is not None:
                    mx.eval(self._call(step, inputs, i))
                else:
                    mx.eval(self._model(*self._arguments(batch)))
            into.collect(before)
        return learned, judged

    @staticmethod
    def _arguments(batch: Batch) -> tuple[Any, ...]:
        arguments: tuple[Any, ...] = widen(model_arguments(batch))
        return arguments

    def _advance(self, step: Step, inputs: list[mx.array] | None) -> None:
        """Run the step, quantized by now, on every batch."""
        if inputs is None or step.like not in self._extras:
            self._states_of = None
            return
        with self._running():
            for i in range(len(inputs)):
                output = self._call(step, inputs, i)
                mx.eval(output)
                inputs[i] = output  # the input is not needed any more
        self._states, self._states_of = inputs, step.path

    def _embedding(self, layer: LayerPlan, steps: list[Step]) -> CalibratedLayer:
        """A tied embedding, by the final hidden states; one that is only looked up has nothing to correct."""
        step = next((s for s in steps if s.path in layer.paths), None)
        if step is None or step.calls < 2:
            return self._fall_back(layer, "lookups only: there is no sum in which columns could make up for each other")
        return self._solve(layer, *self._moments(step, [layer], None))

    def _solve(self, layer: LayerPlan, learned: InputMoments, judged: InputMoments | None) -> CalibratedLayer:
        moments = learned.of(layer.path)
        if moments is None:
            return self._fall_back(layer, "no calibration input reached it")
        assert layer.format is not None
        self._bar.update(text=layer.path)
        weight = read_array(dense_twin(layer.module)["weight"])
        bits, size = layer.format.bits, layer.format.group_size
        optimal = quantize_affine(weight, bits, size, effort=self._effort)
        drift = learned.drift_of(layer.path)
        metric = learned if judged is None or judged.of(layer.path) is None else judged
        test, test_drift = metric.of(layer.path), metric.drift_of(layer.path)
        if isinstance(layer.module, nn.Embedding):
            # It is looked up as well, which takes each weight as it is: both relative errors count.
            moments, test = _with_lookups(weight, moments), _with_lookups(weight, test)
        stacked = weight.ndim == 3
        experts = weight.shape[0] if stacked else 1
        shrinkage = shrinkage_for(weight.shape[-1], learned.tokens[layer.path] // experts)
        parts = []
        for e in range(experts):
            at: Any = e if stacked else slice(None)
            start: Any = tuple(a[at] for a in optimal)
            wanted = weight[at] if drift is None else corrected(weight, moments, drift, shrinkage)
            parts.append(
                quantize_gptq(wanted, moments[at], bits, size, effort=self._effort, start=start, shrinkage=shrinkage)
            )
        columns: Any = list(zip(*parts, strict=True))[:3]
        found: Arrays = tuple(mx.stack(list(a)) if stacked else a[0] for a in columns)  # type: ignore[assignment]
        errors = [_error(weight, arrays, test, test_drift, bits, size) for arrays in (found, optimal)]
        better = errors[0] < errors[1]
        self._install(layer, found if better else optimal)
        self._bar.advance()
        note = None
        if not better:
            note = f"kept 'optimal': gptq's output error was {errors[0]:.3g} against {errors[1]:.3g}"
        return CalibratedLayer(layer.path, "gptq" if better else "optimal", min(errors), errors[1], note)

    def _fall_back(self, layer: LayerPlan, why: str) -> CalibratedLayer:
        assert layer.format is not None
        weight = read_array(dense_twin(layer.module)["weight"])
        arrays = quantize_affine(weight, layer.format.bits, layer.format.group_size, effort=self._effort)
        self._install(layer, arrays)
        self._bar.advance()
        return CalibratedLayer(layer.path, "optimal", None, None, f"kept 'optimal': {why}")


def _error(weight: mx.array, arrays: Arrays, moments: Any, drift: Drift | None, bits: int, size: int) -> float:
    """Relative output error; over a stack of experts, of all their outputs together."""
    after = dequantize_arrays(*arrays, group_size=size, bits=bits)
    if drift is not None and drift.own is not None:
        return drifted_output_error(weight, after, moments, drift)
    if weight.ndim == 2:
        return output_error(weight, after, moments)
    energies = [_energy(w.astype(mx.float32), h) for w, h in zip(weight, moments, strict=True)]
    errors = [output_error(w, a, h) for w, a, h in zip(weight, after, moments, strict=True)]
    total = sum(energies)
    return sum(e * n for e, n in zip(errors, energies, strict=True)) / total if total > 0 else 0.0


def _with_lookups(weight: mx.array, moments: Any, share: float = LOOKUP_SHARE) -> mx.array:
    """The metric of a tied embedding: relative squared error of the logits plus that of the rows themselves."""
    w = weight.astype(mx.float32)
    rows = share / max(number(mx.square(w).sum()), 1e-30)
    return moments / max(_energy(w, moments), 1e-30) + rows * mx.eye(moments.shape[0])


def _energy(weight: mx.array, moments: mx.array) -> float:
    return number(((weight @ moments) * weight).sum())
