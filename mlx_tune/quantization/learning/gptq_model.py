"""GPTQ on a model: layer after layer, each given what the quantized ones before it hand on.

Each layer makes up for some of what was lost before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.devices import computes_on_cpu
from mlx_tune.errors import QuantizationError
from mlx_tune.measuring.float32_products import matmul_float32
from mlx_tune.memory import memory_budget
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.formats.overflow import overflows
from mlx_tune.quantization.formats.packed_arrays import pack_weight
from mlx_tune.quantization.formats.packing import dequantize_float32
from mlx_tune.quantization.formats.powers_of_two import in_range
from mlx_tune.quantization.learning.curvature import Curvature
from mlx_tune.quantization.learning.drift_correction import OutputErrors, corrected
from mlx_tune.quantization.learning.experts import note_of_experts
from mlx_tune.quantization.learning.gptq import quantize_gptq, shrinkage_for
from mlx_tune.quantization.learning.kept_arrays import KeptArrays
from mlx_tune.quantization.learning.moments import Drift, InputMoments
from mlx_tune.quantization.learning.propagation import Propagation, Read
from mlx_tune.quantization.models.batches import Batch, in_parts
from mlx_tune.quantization.models.interception import Step, forward_steps
from mlx_tune.quantization.models.layers import read_weight
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.planning.plan import LayerPlan
from mlx_tune.units import number

Arrays = tuple[mx.array, mx.array, mx.array]

#: Tokens that run through a block at once, however large the batches are.
_PART_TOKENS = 4096

#: The part of the memory there is in which the inputs of layers are kept; beyond it they go to disk.
_SHARE_OF_MEMORY = 4

#: How much the relative error of a tied embedding's rows counts beside that of its logits.
LOOKUP_SHARE = 1.0


#: Weights whose rows are solved together, which bounds the memory.
_WEIGHTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class CalibratedLayer:
    """The outcome of one layer.

    Attributes:
        path: Where it stands first.
        method: "gptq", or "optimal" or "nearest" where that was no worse.
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


#: The outcome and the arrays of a layer that has been quantized before; None where it has not.
Known = Callable[[LayerPlan], "tuple[CalibratedLayer, Arrays] | None"]


def gptq_model(
    model: WalkedModel,
    layers: Sequence[LayerPlan],
    calibration: Sequence[Batch],
    *,
    install: Callable[[LayerPlan, Arrays], None],
    blocks: Sequence[tuple[str, nn.Module]] = (),
    effort: Effort = "fast",
    progress: bool = False,
    room_bytes: int | None = None,
    read: Read = lambda _: nullcontext(),
    known: Known = lambda _: None,
    left: Callable[[Sequence[tuple[LayerPlan, CalibratedLayer]]], None] = lambda _: None,
) -> list[CalibratedLayer]:
    """Quantize the planned layers of a model with GPTQ.

    A layer's inputs come from quantized ones, in the blocks before its own and in its own. Where the model hands a
    block's output straight to the next, as nearly all do, blocks are called one by one, and how far inputs have moved
    from those of the unquantized model is known. Where it does not, the model is run from its start for every block,
    once for all layers of the block. A tied embedding goes first, by what the head is given: the blocks then learn
    from its lookups.

    Args:
        model: The model; `install` changes it.
        layers: Affine layers of its plan.
        calibration: Batches. Those of tokens are cut into parts of some thousand tokens; one part in eight judges
            instead of teaching.
        install: Puts a layer's packed weights into the model.
        blocks: The model's blocks; without, every layer is a step of its own.
        effort: "fast" or "best".
        progress: Show a progress line.
        room_bytes: The most of what layers are given that is kept in memory; a quarter of what there is by default.
        read: Has the weights read of a block, or of the whole model in turn, where they lie on disk.
        known: Tells the outcome and the arrays of a layer that an earlier call has quantized.
        left: Told of the layers of one step after another, once they are in the model and have run.

    Returns:
        The outcome of each layer, in the plan's order.

    Raises:
        QuantizationError: There are no batches, or inputs are not finite.

    Examples:
        >>> from mlx_tune.quantization.methods import install
        >>> from mlx_tune.quantization.models.batches import read_batches
        >>> from mlx_tune.quantization.dry_run import plan_quantization
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> mix = mx.random.normal((8, 64))  # real inputs are correlated, too
        >>> batches = read_batches([mx.random.normal((32, 8)) @ mix for _ in range(8)], "calibration")
        >>> layers = plan_quantization(model, 3, 64).layers
        >>> [layer.method for layer in gptq_model(WalkedModel(model), layers, batches, install=install)]
        ['gptq', 'gptq']
    """
    if not calibration:
        raise QuantizationError("GPTQ learns from batches: calibration is empty.")
    room = memory_budget() // _SHARE_OF_MEMORY if room_bytes is None else room_bytes
    with KeptArrays(room) as kept, progress_bar("gptq", len(layers), enabled=progress) as bar:
        run = _Pass(model, list(layers), in_parts(calibration, _PART_TOKENS), install, effort, bar, read, known, left)
        done = run.all(blocks, kept)
    return [done[layer.path] for layer in layers]


class _Pass:
    """One pass over a model."""

    def __init__(
        self,
        model: WalkedModel,
        layers: list[LayerPlan],
        batches: list[Batch],
        install: Callable[[LayerPlan, Arrays], None],
        effort: Effort,
        bar: Bar,
        read: Read,
        known: Known,
        left: Callable[[Sequence[tuple[LayerPlan, CalibratedLayer]]], None],
    ) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self._install, self._effort, self._bar = install, effort, bar
        self._read, self._known, self._left = read, known, left

    def all(self, blocks: Sequence[tuple[str, nn.Module]], kept: KeptArrays) -> dict[str, CalibratedLayer]:
        done: dict[str, CalibratedLayer] = {}
        modules = {path: layer.module for layer in self._layers for path in layer.paths}
        with self._model.running():
            call = partial(self._batches[0].inputs.call, self._model.model)
            steps = forward_steps(call, list(modules.items()), blocks)
        of_step = {s.path: {x.path: x.module for x in self._layers if self._belongs(x, s)} for s in steps}
        inputs = Propagation(self._model, self._batches, steps, self._read, of_step, kept)
        for layer in self._layers:
            if isinstance(layer.module, nn.Embedding):
                done[layer.path] = self._embedding(layer, steps, inputs)
                self._left([(layer, done[layer.path])])
        for i, step in enumerate(steps):
            mine = {x.path: x for x in self._layers if x.path not in done and self._belongs(x, step)}
            following = steps[i + 1] if i + 1 < len(steps) and steps[i + 1].follows == step.path else None
            if not mine and following is None and step.follows is None:
                continue
            inputs.enter(step)
            if mine:
                done |= self._step(step, mine, inputs)
            inputs.leave(step, following, {path: layer.module for path, layer in mine.items()})
            self._left([(layer, done[path]) for path, layer in mine.items()])
        for layer in self._layers:
            if layer.path not in done:
                done[layer.path] = self._fall_back(layer, "no calibration input reached it")
                self._left([(layer, done[layer.path])])
        return done

    @staticmethod
    def _belongs(layer: LayerPlan, step: Step) -> bool:
        return any(path == step.path or path.startswith(f"{step.path}.") for path in layer.paths)

    def _step(self, step: Step, layers: dict[str, LayerPlan], inputs: Propagation) -> dict[str, CalibratedLayer]:
        """The layers of one step: those that are given what others make after these."""
        modules = {path: layer.module for path, layer in layers.items()}
        stages = inputs.stages(step, modules)
        found: dict[str, tuple[CalibratedLayer, Arrays]] = {}
        weights: list[tuple[nn.Module, mx.array]] = []
        for k, stage in enumerate(stages):
            # The unquantized modules stay until all are done, since the step is run as it was before for each stage.
            last = k == len(stages) - 1
            learned, judged = inputs.moments(step, {path: modules[path] for path in stage}, modules, weights)
            for those in self._alike([layers[path] for path in stage], learned):
                made = [self._known(layer) for layer in those]
                solutions = self._solve(those, learned, judged) if None in made else [x for x in made if x is not None]
                for layer, solved in zip(those, solutions, strict=True):
                    found[layer.path] = solved
                    if not last:
                        weights.append((layer.module, self._standing_for(layer, solved[1])))
        del modules, weights
        for path, (_, arrays) in found.items():
            self._install(layers[path], arrays)
        return {path: outcome for path, (outcome, _) in found.items()}

    @staticmethod
    def _standing_for(layer: LayerPlan, arrays: Arrays) -> mx.array:
        """The weights that packed arrays stand for, as the step computes with them."""
        cpu = computes_on_cpu()
        weight = dequantize_float32(*arrays, group_size=layer.wanted.group_size, bits=layer.wanted.bits)
        weight = weight if cpu else weight.astype(arrays[1].dtype)
        mx.eval(weight)
        return weight

    def _embedding(self, layer: LayerPlan, steps: list[Step], inputs: Propagation) -> CalibratedLayer:
        """A tied embedding, by the final hidden states; one that is only looked up has nothing to correct."""
        step = next((s for s in steps if s.path in layer.paths), None)
        if (made := self._known(layer)) is not None:
            self._install(layer, made[1])
            return made[0]
        if step is None or step.calls < 2:
            return self._fall_back(layer, "lookups only: there is no sum in which columns could make up for each other")
        ((outcome, arrays),) = self._solve([layer], *inputs.moments(step, {layer.path: layer.module}))
        self._install(layer, arrays)
        return outcome

    @staticmethod
    def _alike(layers: list[LayerPlan], learned: InputMoments) -> list[list[LayerPlan]]:
        """Layers that can be solved as one: they are given the same inputs and get the same format."""
        found: dict[object, list[LayerPlan]] = {}
        for layer in layers:
            moments, weight = learned.of(layer.path), layer.module["weight"]
            alone = moments is None or weight.ndim == 3
            key = layer.path if alone else (id(moments), layer.wanted, weight.dtype)
            found.setdefault(key, []).append(layer)
        return list(found.values())

    def _solve(
        self, layers: list[LayerPlan], learned: InputMoments, judged: InputMoments | None
    ) -> list[tuple[CalibratedLayer, Arrays]]:
        """Layers that are given the same inputs, their rows one below the other."""
        first = layers[0]
        moments = learned.of(first.path)
        if moments is None:
            return [self._optimal(first, "no calibration input reached it")]
        self._bar.update(text=first.path)
        if not number(mx.isfinite(moments).all()):
            raise QuantizationError(
                f"{first.path} was given calibration inputs that are not finite, or whose squares are not. Look at the "
                "weights before it, or use method='optimal', which needs no inputs."
            )
        weights, units = zip(*(in_range(read_weight(layer.module)) for layer in layers), strict=True)
        bits, size = first.wanted.bits, first.wanted.group_size
        drift = learned.drift_of(first.path)
        metric = learned if judged is None or judged.of(first.path) is None else judged
        test, test_drift = metric.of(first.path), metric.drift_of(first.path)
        assert test is not None
        if isinstance(first.module, nn.Embedding):
            # It is looked up as well, which takes each weight as it is: both relative errors count.
            moments, test = _with_lookups(weights[0], moments), _with_lookups(weights[0], test)
        energy = mx.diagonal(moments, axis1=-2, axis2=-1)
        optimal, nearest = (
            [self._packed(weight, layer, how, energy) for weight, layer in zip(weights, layers, strict=True)]
            for how in ("optimal", "nearest")
        )
        counts = learned.experts_of(first.path)
        if counts is None:
            every: Any = tuple(mx.concatenate(list(arrays)) for arrays in zip(*optimal, strict=True))
            together = mx.concatenate(list(weights))
            one = self._gptq(together, every, moments, drift, size, bits, learned.tokens[first.path], test, test_drift)
            ends = list(accumulate(weight.shape[0] for weight in weights))
            columns: Any = zip(*(mx.split(array, ends[:-1]) for array in one), strict=True)
            found: list[Arrays] = list(columns)
        else:
            starts: Any = zip(*optimal[0], strict=True)
            parts = [
                self._gptq(weight, start, h, None, size, bits, count)
                for weight, start, h, count in zip(weights[0], starts, moments, counts, strict=True)
            ]
            stacks: Any = tuple(mx.stack(list(arrays)) for arrays in zip(*parts, strict=True))
            found = [stacks]
        solved = []
        for i, layer in enumerate(layers):
            made = {"optimal": optimal[i], "nearest": nearest[i], "gptq": found[i]}
            for name in ("nearest", "gptq"):
                if overflows(made[name], layer.wanted, weights[i].dtype):
                    del made[name]
            outputs = _outputs(weights[i], test, test_drift)
            errors = {name: _error(outputs, arrays, bits, size) for name, arrays in made.items()}
            solved.append((self._outcome(layer, errors, counts), self._kept(made, errors, units[i])))
            self._bar.advance()
        return solved

    def _gptq(
        self,
        weight: mx.array,
        start: Arrays,
        moments: mx.array,
        drift: Drift | None,
        size: int,
        bits: int,
        tokens: int,
        test: mx.array | None = None,
        test_drift: Drift | None = None,
    ) -> Arrays:
        curvature = Curvature(moments, size, shrinkage_for(weight.shape[-1], tokens))
        rows, parts = max(1, _WEIGHTS_AT_ONCE // weight.shape[-1]), []
        for i in range(0, weight.shape[0], rows):
            part = weight[i : i + rows]
            begin: Any = tuple(array[i : i + rows] for array in start)
            wanted = part if drift is None else corrected(part, curvature, drift, test, test_drift)
            found = quantize_gptq(wanted, moments, bits, size, effort=self._effort, start=begin, curvature=curvature)
            parts.append(found[:3])
        packed, scales, biases = (mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
        return packed, scales, biases

    @staticmethod
    def _outcome(layer: LayerPlan, errors: dict[str, float], counts: list[int] | None) -> CalibratedLayer:
        best, notes = _least(errors), []
        if best != "gptq":
            lost = f"{errors['gptq']:.3g}" if "gptq" in errors else "infinite"
            notes.append(f"kept {best!r}: gptq's output error was {lost} against {errors[best]:.3g}")
        if counts is not None and (unseen := note_of_experts(counts)):
            notes.append(unseen)
        return CalibratedLayer(layer.path, best, errors[best], errors["optimal"], "; ".join(notes) or None)

    @staticmethod
    def _kept(made: dict[str, Arrays], errors: dict[str, float], unit: mx.array) -> Arrays:
        packed, scales, biases = made[_least(errors)]
        unit = unit.astype(scales.dtype)
        return packed, scales * unit, biases * unit

    def _fall_back(self, layer: LayerPlan, why: str) -> CalibratedLayer:
        outcome, arrays = self._known(layer) or self._optimal(layer, why)
        self._install(layer, arrays)
        return outcome

    def _optimal(self, layer: LayerPlan, why: str) -> tuple[CalibratedLayer, Arrays]:
        arrays = self._packed(read_weight(layer.module), layer, "optimal", layer.energy)
        self._bar.advance()
        return CalibratedLayer(layer.path, "optimal", None, None, f"kept 'optimal': {why}"), arrays

    def _packed(self, weight: mx.array, layer: LayerPlan, method: str, energy: mx.array | None) -> Arrays:
        (packed, scales, biases), _ = pack_weight(weight, layer.wanted, method, self._effort, energy)
        assert biases is not None
        return packed, scales, biases


def _least(errors: dict[str, float]) -> str:
    return min(errors, key=lambda name: errors[name])  # of equals the first


def _outputs(weight: mx.array, moments: mx.array, drift: Drift | None) -> list[OutputErrors]:
    """The judges of a layer's outputs: one, or one for each expert of a stack."""
    if weight.ndim == 2:
        return [OutputErrors(weight, moments, drift)]
    return [OutputErrors(w, h) for w, h in zip(weight, moments, strict=True)]


def _error(outputs: list[OutputErrors], arrays: Arrays, bits: int, size: int) -> float:
    """Relative output error; over a stack of experts, of all their outputs together."""
    after = dequantize_float32(*arrays, group_size=size, bits=bits)
    if len(outputs) == 1:
        return outputs[0].of(after.reshape(-1, after.shape[-1]))
    total = sum(x.energy for x in outputs)
    return sum(x.of(a) * x.energy for x, a in zip(outputs, after, strict=True)) / total if total > 0 else 0.0


def _with_lookups(weight: mx.array, moments: mx.array, share: float = LOOKUP_SHARE) -> mx.array:
    """The metric of a tied embedding: relative squared error of the logits plus that of the rows themselves."""
    w = weight.astype(mx.float32)
    rows = share / max(number(mx.square(w).sum()), 1e-30)
    return moments / max(_energy(w, moments), 1e-30) + rows * mx.eye(moments.shape[0])


def _energy(weight: mx.array, moments: mx.array) -> float:
    return number((matmul_float32(weight, moments) * weight).sum())
