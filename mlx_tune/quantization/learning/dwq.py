"""Training scales and biases against the unquantized model: distillation, with the codes left as they are.

The idea is mlx-lm's DWQ (https://github.com/ml-explore/mlx-lm, `mlx_lm.dwq`). Differences: steps are measured in
quantization steps of each group, so that rates need no guessing by bits; a few rates are tried briefly, the best goes
on, and comes down where it is too high; batches kept aside decide when to stop and what is kept; any model, any
batches, any loss.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_tune.devices import computes_on_cpu
from mlx_tune.errors import CheckpointError, QuantizationError
from mlx_tune.losses.splitting import split_head
from mlx_tune.memory import memory_budget, track_memory
from mlx_tune.progress import Bar, progress_bar
from mlx_tune.quantization.learning.data_parallel import Shares
from mlx_tune.quantization.learning.distance import Answers, Distance, Head
from mlx_tune.quantization.learning.trainable import (
    NAMES,
    made_dense,
    stays_in_range,
    stored_pair,
    trainable_sites,
    trained_in_place,
)
from mlx_tune.quantization.models.answers import Loss, mean_loss
from mlx_tune.quantization.models.batches import Batch, count_tokens, in_parts
from mlx_tune.quantization.models.sites import WalkedModel, widen
from mlx_tune.quantization.models.stored_outputs import OutputStore
from mlx_tune.units import number

#: Adam's step, in quantization steps at the ends of a group's grid; the best of these is found by trying.
RATES = (0.003, 0.01, 0.03)

#: Steps that a run is given unless told otherwise: fewer leave the grid where it was, more are ended by early stopping.
_STEPS = 256

#: After so many judgements that were no better, training goes back to the best and on from there with a third of the
#: rate; it ends where that is a tenth of the lowest rate tried.
_PATIENCE = 2

#: Token batches are cut into steps of at most so many tokens: many small steps learn more from a text than few large
#: ones.
_STEP_TOKENS = 1024

#: One step in so many is kept aside, up to so many tokens.
_HELD_OUT_EVERY, _HELD_OUT_TOKENS = 8, 8192

Parameters = list[dict[str, mx.array]]


class Recomputed(Protocol):
    """A model whose blocks recompute their activations."""

    @property
    def paths(self) -> Sequence[str]:
        """The blocks that do."""

    def undo(self) -> object:
        """Let them keep their activations again."""


#: Makes a model recompute its blocks' activations; CheckpointError where nothing is repeated in it.
Recompute = Callable[[nn.Module], Recomputed]


class SplitModel(Head, Protocol):
    """A model's output layer, and what is before it."""

    def states(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """The states that the layer is given."""


#: Splits a model; the reason where it cannot be.
Split = Callable[[nn.Module], SplitModel | str]


@dataclass(frozen=True)
class DwqResult:
    """The record of a training.

    Attributes:
        loss_before: On the batches kept aside: mean KL divergence in nats for logits, relative squared error for
            other outputs, or the caller's loss.
        loss_after: The same with what was kept; never more.
        rate: The learning rate that was found best, in quantization steps.
        steps: Training steps done, trials included.
        layers: The number of trained layers.
        checkpointed: True where activations were recomputed to save memory.
        ranks: The number of processes that shared the calibration.
        note: Why nothing was kept, where nothing was.
    """

    loss_before: float
    loss_after: float
    rate: float
    steps: int
    layers: int
    checkpointed: bool
    ranks: int = 1
    note: str | None = None

    @property
    def summary(self) -> str:
        """One sentence for a report."""
        if self.note is not None:
            return f"dwq: {self.note}."
        recomputed = ", activations recomputed" if self.checkpointed else ""
        recomputed += f", over {self.ranks} ranks" if self.ranks > 1 else ""
        return (
            f"dwq: {self.loss_before:.4g} to {self.loss_after:.4g} on calibration kept aside, "
            f"in {self.steps} steps at a rate of {self.rate:g} quantization steps{recomputed}."
        )


def train_dwq(
    model: WalkedModel,
    reference: Callable[..., object] | None,
    calibration: Sequence[Batch],
    *,
    loss: Loss | None = None,
    rates: Sequence[float] = RATES,
    epochs: int | None = None,
    recompute: Recompute | None = None,
    split: Split = split_head,
    checkpoint: bool | None = None,
    group: object = None,
    progress: bool = True,
) -> DwqResult:
    """Train scales and biases of a quantized model's affine layers, in place.

    Under `mlx.launch` all ranks call this with the same model and calibration: each works on its sequences of every
    step, gradients are averaged, and all end with the same numbers, those of one rank alone but for rounding.

    Args:
        model: The quantized model; it is changed only if that is better on the batches kept aside.
        reference: The unquantized model, or anything that is called alike and gives what it would give. Not needed
            with `loss`.
        calibration: Batches. Those of tokens are cut into steps of some thousand tokens; one step in eight, up to 8,192
            tokens, is kept aside and never trained on.
        loss: `loss(model, *batch)`, a scalar, instead of the distance to the reference.
        rates: Learning rates to try, in quantization steps.
        epochs: The number of passes over the calibration; by default as often as makes some 256 steps. Where the loss
            on the batches kept aside stops falling, training goes on from the best at a lower rate, or ends.
        recompute: Makes the model recompute activations of its blocks; None for never.
        split: Finds a model's output layer, so that the logits of all tokens are never held.
        checkpoint: True has the model do so, False not; by default where memory calls for it.
        group: The `mx.distributed` group to share the calibration with; by default that of `mlx.launch`, where it
            started this process.
        progress: Show a progress line with the loss on the batches kept aside.

    Returns:
        Losses before and after, and how they came about.

    Raises:
        QuantizationError: A single sequence or batch, nothing to train, or neither reference nor loss.

    Examples:
        >>> from mlx_tune.quantization.models.batches import read_batches
        >>> mx.random.seed(0)
        >>> reference = nn.Sequential(nn.Linear(64, 32))
        >>> model = nn.Sequential(nn.QuantizedLinear.from_linear(reference.layers[0], 64, 2))
        >>> batches = read_batches([mx.random.normal((64, 64)) for _ in range(16)], "calibration")
        >>> result = train_dwq(WalkedModel(model), reference, batches, progress=False)
        >>> result.loss_after < result.loss_before
        True
    """
    lessons, judges = _lessons_and_judges(calibration)
    if not judges:
        one = "one sequence" if calibration[0].tokens is not None else "one batch"
        raise QuantizationError(
            f"calibration holds {one}: method='dwq' trains on some of it and judges on the rest. Pass dozens."
        )
    if reference is None and loss is None:
        raise QuantizationError("Training needs the unquantized model as reference, or a loss.")
    sites = trainable_sites(model)
    if not sites:
        raise QuantizationError("Nothing to train: no layer of the model has affine scales and biases.")
    cpu = computes_on_cpu()
    dtype = mx.float32 if cpu else sites[0].module["scales"].dtype
    with ExitStack() as stack:
        stack.enter_context(model.evaluation_mode())
        if isinstance(reference, nn.Module):
            stack.enter_context(WalkedModel(reference).running())
        layers = stack.enter_context(trained_in_place(sites, dtype))
        if cpu:
            stack.enter_context(model.float32_arithmetic())
        shares = Shares(group)
        bar = stack.enter_context(progress_bar("dwq", enabled=progress and shares.rank == 0))
        store = stack.enter_context(OutputStore())
        distance = None
        if loss is None and reference is not None:
            distance = Distance(_answers(model.model, split), _answers(reference, split), store, made_dense)
        training = _Training(model.model, layers, distance, lessons, judges, loss, shares, bar)
        result, best = training.run(
            tuple(rates), epochs, None if checkpoint is False else recompute, forced=checkpoint is True
        )
        training.put(best)
        pairs = [stored_pair(layer) for layer in layers]
        mx.eval(pairs)
    if result.loss_after < result.loss_before:
        for site, (scales, biases) in zip(sites, pairs, strict=True):
            site.module["scales"], site.module["biases"] = scales, biases
    return result


class _Training:
    """Adam on the trained numbers of some layers, batches kept aside deciding."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        distance: Distance | None,
        lessons: list[Batch],
        judges: list[Batch],
        loss: Loss | None,
        shares: Shares,
        bar: Bar,
    ) -> None:
        self._model, self._layers, self._distance, self._loss = model, layers, distance, loss
        self._shares = shares
        # A loss of the caller's own need not be a mean over sequences: then every rank works on all of a step.
        self._lessons = [shares.of(batch, divide=loss is None) for batch in lessons]
        self._judges = [shares.of(batch, divide=loss is None) for batch in judges]
        self._bar = bar
        self._steps = 0
        self._gradient = mx.value_and_grad(self._loss_of)

    def run(
        self, rates: tuple[float, ...], epochs: int | None, recompute: Recompute | None, *, forced: bool
    ) -> tuple[DwqResult, Parameters]:
        """Try the rates, go on with the best, and give back the best numbers seen."""
        start: Parameters = [{name: layer[name] for name in NAMES} for layer in self._layers]
        before = best_loss = self._judge(start)
        best, best_rate = start, rates[0]
        total = len(self._lessons) * (epochs or math.ceil(_STEPS / len(self._lessons)))
        trial = max(1, min(total // 8, 16))
        every = max(4, total // 12)
        self._bar.update(total=trial * len(rates) + total, text=f"held-out loss {before:.4g}")
        with ExitStack() as stack:
            checkpointed = recompute is not None and self._checkpoint(stack, start, recompute, forced=forced)
            tried = []
            for rate in rates:
                state = _Adam(start)
                found = self._train(start, state, rate, range(trial), trial, decay=False)
                loss = self._judge(found)
                tried.append((loss, rate, found, state))
                if found is not None and loss < best_loss:
                    best_loss, best, best_rate = loss, found, rate
            _, rate, current, state = min(tried, key=lambda t: t[0])
            worse, step = 0, trial
            while step < total and rate > 0.1 * min(rates):
                stop = min(step + every, total)
                current = self._train(current, state, rate, range(step, stop), total, decay=True) if current else None
                step = stop
                loss = self._judge(current)
                worse = worse + 1 if loss >= best_loss else 0
                if current is not None and loss < best_loss:
                    best_loss, best, best_rate = loss, current, rate
                if current is None or worse == _PATIENCE:
                    # Steps of this size stray further than they teach: smaller ones, from the best so far.
                    current, state, rate, worse = best, _Adam(best), rate / 3, 0
                self._bar.update(text=f"held-out loss {loss:.4g}, from {before:.4g}")
        note = None if best_loss < before else "training made nothing better on the batches kept aside: left as it was"
        ranks = self._shares.size
        result = DwqResult(before, best_loss, best_rate, self._steps, len(self._layers), checkpointed, ranks, note)
        return result, best

    def put(self, parameters: Parameters) -> None:
        """Hand the layers their numbers."""
        for layer, own in zip(self._layers, parameters, strict=True):
            for name, value in own.items():
                dict.__setitem__(layer, name, value)

    def _checkpoint(self, stack: ExitStack, start: Parameters, recompute: Recompute, *, forced: bool) -> bool:
        """Recompute activations if one step without that would come near what memory there is."""
        try:
            handle = recompute(self._model)
        except CheckpointError:
            return False  # nothing is repeated in it
        batch = next((share.batch for share in self._lessons if share.batch is not None), None)
        if not forced and batch is not None:
            with track_memory() as memory:
                mx.eval(self._gradient(start, batch, self._targets(batch)))
            self.put(start)
            # Without recomputation every block's activations are held at once: at worst so many times the peak now.
            if memory.peak_bytes * len(handle.paths) < int(memory_budget()) // 2:
                handle.undo()
                return False
        stack.callback(handle.undo)
        return True

    def _train(
        self, parameters: Parameters, state: _Adam, rate: float, steps: range, total: int, decay: bool
    ) -> Parameters | None:
        """Some steps; None where the loss stopped being a number."""
        for step in steps:
            share = self._lessons[step % len(self._lessons)]
            loss, gradients = mx.array(0.0), tree_map(mx.zeros_like, parameters)
            if share.batch is not None:
                loss, gradients = self._gradient(parameters, share.batch, self._targets(share.batch))
            loss, gradients = self._shares.mean(share, loss, gradients)
            part = 0.5 * (1 + math.cos(math.pi * step / total)) if decay else 1.0
            parameters = state.step(parameters, gradients, rate * part)
            mx.eval(loss, parameters, state.moments)
            self._steps += 1
            self._bar.advance()
            if not math.isfinite(number(loss)):
                return None
        return parameters

    def _judge(self, parameters: Parameters | None) -> float:
        """The loss on the batches kept aside; infinite where training, it or what would be stored is no number."""
        if parameters is None:
            return math.inf
        self.put(parameters)
        if not all(stays_in_range(layer) for layer in self._layers):
            return math.inf
        own = 0.0
        for share in self._judges:
            if share.batch is not None:
                loss = number(self._loss_of(parameters, share.batch, self._targets(share.batch), learn=False))
                own += loss * share.weight * share.size
        self.put(parameters)
        loss = self._shares.total(own) / sum(share.size for share in self._judges)
        return loss if math.isfinite(loss) else math.inf

    def _targets(self, batch: Batch) -> list[mx.array]:
        return [] if self._distance is None else self._distance.targets(batch)

    def _loss_of(
        self, parameters: Parameters, batch: Batch, targets: list[mx.array], *, learn: bool = True
    ) -> mx.array:
        self.put(parameters)
        if self._distance is not None:
            return self._distance.of(batch, targets, learn=learn)
        assert self._loss is not None
        return mean_loss(batch.call(self._loss, self._model))


def _answers(model: Callable[..., object], split: Split) -> Answers:
    """The ways to ask a model; of what is none, the outputs alone."""
    head = split(model) if isinstance(model, nn.Module) else "it is no module"

    def states(tokens: mx.array) -> mx.array:
        assert isinstance(model, nn.Module)
        assert not isinstance(head, str)
        return head.states(model, tokens)

    whole = None if isinstance(head, str) else head
    return Answers(lambda batch: batch.inputs.call(model, through=widen), states, whole)


def _lessons_and_judges(calibration: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The batches to train on, in an order of their own, and those to judge on."""
    parts = in_parts(calibration, _STEP_TOKENS)
    aside = list(range(_HELD_OUT_EVERY - 1, len(parts), _HELD_OUT_EVERY)) or [len(parts) - 1][: len(parts) - 1]
    tokens = count_tokens([parts[i] for i in aside])
    # Evenly spread over the whole, if not all of it: neighbours are often cut from one document.
    aside = aside[:: max(1, math.ceil(tokens / _HELD_OUT_TOKENS))]
    lessons = [part for i, part in enumerate(parts) if i not in set(aside)]
    # Texts of one kind often follow each other, and the last ones would be learned best.
    random.Random(0).shuffle(lessons)
    return lessons, [parts[i] for i in aside]


class _Adam:
    """Adam (Kingma and Ba, 2014) on a list of dictionaries, without hidden state."""

    def __init__(self, like: Parameters) -> None:
        zeros = tree_map(mx.zeros_like, like)
        self.moments: Any = (zeros, zeros)
        self._count = 0

    def step(self, parameters: Parameters, gradients: object, rate: float) -> Parameters:
        """Parameters after one step."""
        self._count += 1
        fast, slow = 0.9, 0.95  # short runs: the second moment must warm up within a few steps
        m = tree_map(lambda a, g: fast * a + (1 - fast) * g, self.moments[0], gradients)
        v = tree_map(lambda a, g: slow * a + (1 - slow) * g * g, self.moments[1], gradients)
        self.moments = (m, v)
        size = rate * math.sqrt(1 - slow**self._count) / (1 - fast**self._count)
        moved: Parameters = tree_map(lambda p, a, b: p - size * a / (mx.sqrt(b) + 1e-12), parameters, m, v)
        return moved
