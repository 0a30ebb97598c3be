"""The distance of a model that is trained from its reference, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.losses.linear_kl_divergence import linear_kl_divergence
from mlx_tune.quantization.models.answers import logits_of, output_arrays
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.stored_outputs import OutputStore

#: Bytes of what the reference gives that are kept on disk for when they are needed again.
_STORED_BYTES = 2 << 30


class Head(Protocol):
    """A model's output layer, and the rest of the way to its logits: a `SplitHead`."""

    @property
    def layer(self) -> nn.Module:
        """The layer."""

    @property
    def scale(self) -> float | None:
        """Multiplies logits."""

    @property
    def softcap(self) -> float | None:
        """Caps them."""

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token."""

    def logits(self, states: mx.array) -> mx.array:
        """The logits of states."""


@dataclass(frozen=True)
class Answers:
    """The ways to ask a model, or what stands for one.

    Attributes:
        outputs: Everything that it gives for a batch.
        states: The states that its output layer is given for tokens `[rows, length]`.
        head: That layer; None where it cannot be split off.
    """

    outputs: Callable[[Batch], object]
    states: Callable[[mx.array], mx.array]
    head: Head | None


class Distance:
    """The mean KL divergence for logits of tokens, the relative squared error for other outputs.

    Where both models can be split into their output layers and what is before them, the logits of neither are ever
    there for all tokens of a batch: the reference's states are what is kept, and chunks of logits are made of them.

    Args:
        model: The model that is trained.
        reference: The one that it should be like.
        store: Keeps what the reference gives.
        dense: Makes of the model's output layer one that multiplies by a weight, worked out once.

    Attributes:
        linear: True where that is so.
    """

    def __init__(
        self, model: Answers, reference: Answers, store: OutputStore, dense: Callable[[nn.Module], nn.Module]
    ) -> None:
        """Note whom to ask; nothing is computed."""
        self._ours, self._theirs, self._store, self._dense = model, reference, store, dense
        self._stored_bytes = 0
        self._places: dict[int, int] = {}
        heads = [answers.head for answers in (model, reference) if answers.head is not None]
        self.linear = len(heads) == 2 and heads[0].vocabulary == heads[1].vocabulary

    def targets(self, batch: Batch) -> list[mx.array]:
        """The states, logits or outputs of the reference for a batch, evaluated."""
        if id(batch) in self._places:
            return self._store.get(self._places[id(batch)])
        arrays = self._made(batch)
        # Targets are constants: evaluated now, so that their graph is not held with that of the model.
        mx.eval(arrays)
        size = sum(array.nbytes for array in arrays)
        if self._stored_bytes + size <= _STORED_BYTES:
            self._places[id(batch)] = len(self._store)
            self._store.put(arrays)
            self._stored_bytes += size
        return arrays

    def _made(self, batch: Batch) -> list[mx.array]:
        if self.linear and batch.tokens is not None:
            return [self._theirs.states(*batch.inputs.arguments)]
        output = self._theirs.outputs(batch)
        logits = logits_of(output)
        return [logits] if batch.tokens is not None and logits.ndim == 3 else output_arrays(output)

    def of(self, batch: Batch, targets: list[mx.array], *, learn: bool = True) -> mx.array:
        """The distance on a batch.

        Args:
            batch: The batch.
            targets: Those of the batch.
            learn: True where its gradient is wanted, which is then made with it.
        """
        ours, theirs = self._ours.head, self._theirs.head
        if self.linear and ours is not None and theirs is not None and batch.tokens is not None:
            states, head = self._ours.states(*batch.inputs.arguments), self._dense(ours.layer)
            head.train(learn)
            return linear_kl_divergence(states, head, targets[0], theirs.logits, scale=ours.scale, softcap=ours.softcap)
        output = self._ours.outputs(batch)
        if batch.tokens is not None and len(targets) == 1 and targets[0].ndim == 3:
            return _divergence(targets[0], logits_of(output))
        pairs = list(zip(targets, output_arrays(output), strict=True))
        error = sum((mx.square(a - b).sum() for a, b in pairs), mx.array(0.0))
        energy = sum((mx.square(a).sum() for a, _ in pairs), mx.array(0.0))
        return error / mx.maximum(energy, 1e-30)


def _divergence(before: mx.array, after: mx.array) -> mx.array:
    """Mean KL divergence of the model from the reference, over tokens."""
    before, after = before.astype(mx.float32), after.astype(mx.float32)
    lx = before - mx.logsumexp(before, axis=-1, keepdims=True)
    ly = after - mx.logsumexp(after, axis=-1, keepdims=True)
    return (mx.exp(lx) * (lx - ly)).sum(-1).mean()
