"""A model's output layer as a function of its arrays, so that gradients with respect to them can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.substitution import plain_class

#: Adapters: small enough to be differentiated in float32, so that sums over chunks keep what one product would.
_ADAPTERS = ("lora_a", "lora_b", "m")

#: Arrays of quantized layers. MLX has no gradient for some of them, so that frozen ones are taken for constants.
_OF_QUANTIZED = ("scales", "biases")


class Head:
    """The product that makes logits out of hidden states.

    Args:
        layer: A layer that is called with hidden states, an embedding, whose table is used as it is tied, or the weight
            itself, `[vocabulary, width]`.

    Attributes:
        arrays: Arrays that a gradient can be asked for.
        trained: For each of these, True where the layer trains it; unknown, and False, for a weight itself.
        training: False where the layer is in evaluation mode.
    """

    def __init__(self, layer: object) -> None:
        """Find the arrays."""
        if not isinstance(layer, nn.Module | mx.array):
            raise InvalidArgumentError(
                f"head={layer!r}: pass the layer that makes the logits, the embedding whose table does, or a weight "
                "[vocabulary, width]."
            )
        self._layer = layer
        self._names: list[str] = []
        self.arrays: list[mx.array] = [layer] if isinstance(layer, mx.array) else []
        self.trained = [False] * len(self.arrays)
        self.training = True
        # The number of the weight, where logits are nothing but a product with it and a bias.
        self._weight = 0 if isinstance(layer, mx.array) else None
        if isinstance(layer, nn.Module):
            flat: Any = tree_flatten(layer.parameters())
            self.training = layer.training
            own: Any = tree_flatten(layer.trainable_parameters())
            training = {name for name, _ in own}
            for name, array in flat:
                constant = name not in training and name.rpartition(".")[2] in _OF_QUANTIZED
                if mx.issubdtype(array.dtype, mx.floating) and not constant:
                    self._names.append(name)
                    self.arrays.append(array)
                    self.trained.append(name in training)
            if plain_class(type(layer)) in (nn.Linear, nn.Embedding):
                self._weight = self._names.index("weight")

    def logits(self, arrays: Sequence[mx.array], hidden: mx.array) -> mx.array:
        """The logits with other arrays in place of the layer's own.

        Args:
            arrays: As `self.arrays`.
            hidden: `[tokens, width]`.

        Returns:
            `[tokens, vocabulary]`.
        """
        if isinstance(self._layer, mx.array):
            return hidden @ arrays[0].T
        assert isinstance(self._layer, nn.Module)
        layer: Any = self._layer
        call: Callable[[mx.array], mx.array] = getattr(layer, "as_linear", layer)
        try:
            self._hold(arrays)
            return call(hidden)
        finally:
            self._hold(self.arrays)

    def vjp(
        self,
        arrays: Sequence[mx.array],
        hidden: mx.array,
        losses_of: Callable[[mx.array], mx.array],
        cotangent: mx.array,
        wanted: Sequence[int],
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        """Losses of logits, and their gradients.

        Args:
            arrays: As `self.arrays`.
            hidden: `[tokens, width]`.
            losses_of: `[tokens]` in float32, from logits `[tokens, vocabulary]`.
            cotangent: Of the losses, `[tokens]`.
            wanted: The arrays, by number, whose gradients are wanted.

        Returns:
            The losses, the gradient of `hidden`, and those of the wanted arrays, in float32 where that costs little.
        """
        if self._weight is not None:
            logits = self.logits(arrays, hidden)
            # Half-precision products summed over chunks would be further off than the one product of a plain loss.
            logits = logits.astype(mx.float32) if wanted else logits
            (losses,), (slopes,) = mx.vjp(lambda logits: [losses_of(logits)], [logits], [cotangent])
            wide = hidden.astype(mx.float32)
            of_arrays = [slopes.T @ wide if i == self._weight else slopes.sum(0) for i in wanted]
            return losses, slopes.astype(hidden.dtype) @ arrays[self._weight], of_arrays

        def losses_from(hidden: mx.array, *some: mx.array) -> list[mx.array]:
            own = list(arrays)
            for i, array in zip(wanted, some, strict=True):
                own[i] = array
            return [losses_of(self.logits(own, hidden))]

        given = [arrays[i].astype(mx.float32) if self._is_adapter(i) else arrays[i] for i in wanted]
        (losses,), (gradient, *of_arrays) = mx.vjp(losses_from, [hidden, *given], [cotangent])
        return losses, gradient, of_arrays

    def _is_adapter(self, number: int) -> bool:
        return self._names[number].rpartition(".")[2] in _ADAPTERS

    def _hold(self, arrays: Sequence[mx.array]) -> None:
        assert isinstance(self._layer, nn.Module)
        self._layer.update(tree_unflatten(list(zip(self._names, arrays, strict=True))))


def finished(logits: mx.array, scale: float | None, softcap: float | None) -> mx.array:
    """Logits multiplied by a scale, then capped, where there is either."""
    logits = logits if scale is None else logits * scale
    return logits if softcap is None else mx.tanh(logits / softcap) * softcap
