"""A model split into its output layer and what is before it, without knowing the model.

The layer is found by looking at the calls of a small forward pass: it is the one that is given states and makes the
logits. What the model does to logits afterwards is found by giving it numbers in their place. Neither pass evaluates a
weight: a model stays on disk that was loaded lazily.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.block.randomness import draws_from, thread_stream
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.losses.heads import finished
from mlx_tune.state import same_training
from mlx_tune.substitution import ModuleCall, intercepted
from mlx_tune.upstream import has_mode, set_mode

#: Tokens of the small passes; any two that are in every vocabulary.
_TOKENS = ((0, 1, 0), (1, 0, 0))
#: Logits that a model is given: zero, small ones to tell a scale from, and one that every cap caps.
_LOGITS = (0.0, 1.0, *(sign * 2.0**e for e in range(-10, 8) for sign in (1, -1)), 2.0**66)
#: The share of the cap below which a capped logit tells its scale.
_UNCAPPED = 0.1


@dataclass(frozen=True)
class SplitHead:
    """The layer that makes a model's logits, and the rest of the way to them.

    Attributes:
        path: Of the layer in the model.
        scale: Multiplies logits; None for 1.
        softcap: Caps them; None for no cap.
        vocabulary: The number of logits of a token.
        layer: The layer, for `linear_cross_entropy`.
    """

    path: str
    scale: float | None
    softcap: float | None
    vocabulary: int
    layer: nn.Module = field(repr=False, compare=False)
    _method: str = field(repr=False, compare=False)

    def states(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """The states that the layer is given, with nothing computed of what comes after.

        Args:
            model: The model.
            tokens: `[rows, length]`.

        Returns:
            `[rows, length, width]`.

        Raises:
            InvalidArgumentError: The model calls its layer otherwise than it did when it was split.
        """
        given, _ = _with_logits(model, tokens, self, mx.zeros((*tokens.shape, self.vocabulary)))
        if len(given) != 1 or given[0].shape[:-1] != tokens.shape:
            raise InvalidArgumentError(
                f"The model gave {self.path!r} {[list(states.shape) for states in given]} for tokens "
                f"{list(tokens.shape)}, and states of each token once when it was split: use the plain loss."
            )
        return given[0]

    def logits(self, states: mx.array) -> mx.array:
        """The model's logits of its states, in float32: what the plain model gives, but for rounding."""
        layer: Any = self.layer
        made: mx.array = getattr(layer, self._method)(states)
        return finished(made.astype(mx.float32), self.scale, self.softcap)


def split_head(model: nn.Module) -> SplitHead | str:
    """Find the layer that makes a model's logits, and what follows it.

    Args:
        model: Called with tokens `[rows, length]`, it returns logits `[rows, length, vocabulary]`.

    Returns:
        The layer; or the reason why the model cannot be split, in words that follow a colon.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16), nn.Linear(16, 100))
        >>> split_head(model)
        SplitHead(path='layers.2', scale=None, softcap=None, vocabulary=100)
        >>> split_head(nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 100), nn.ReLU()))
        "'layers.2' comes after its output layer 'layers.1'"
    """
    tokens = mx.array(_TOKENS)
    with same_training(model), draws_from(mx.random.key(0)):
        for module in model.modules():
            if has_mode(module):
                set_mode(module, True)  # where dropout draws
        try:
            logits, calls = _calls(model, tokens)
        except Exception as error:
            return f"it cannot be called with tokens alone ({type(error).__name__}: {error})"
        if not isinstance(logits, mx.array) or logits.shape[:-1] != tokens.shape:
            return "it does not return logits of each token"
        found = [call for call in calls if call.makes(logits.shape)]
        if not found:
            return "no linear layer and no embedding makes its logits from states"
        last = max(found, key=lambda call: call.ended)
        paths = {id(module): path for path, module in model.named_modules()}
        path = paths[id(last.module)]
        if sum(call.module is last.module and call.name == last.name for call in calls) > 1:
            return f"it calls its output layer {path!r} more than once"
        if last.draws:
            return f"its output layer {path!r} draws random numbers, which would be others for each chunk"
        after = [call for call in calls if call.began > last.ended]
        if after:
            return f"{paths[id(after[0].module)]!r} comes after its output layer {path!r}"
        head = SplitHead(path, None, None, logits.shape[-1], last.module, last.name)
        return _with_shape(model, tokens, head)


@dataclass
class _Call:
    """One module's call, with its place in the order of beginnings and ends."""

    module: nn.Module
    name: str
    inputs: mx.array | None
    output: object
    began: int
    ended: int
    draws: bool

    def makes(self, shape: tuple[int, ...]) -> bool:
        """True where a layer that works on each token alone made logits of this shape from states."""
        linear = self.name == "as_linear" or isinstance(self.module, nn.Linear | nn.QuantizedLinear) or _adapts(self)
        return (
            linear
            and isinstance(self.output, mx.array)
            and self.output.shape == shape
            and self.inputs is not None
            and self.inputs.shape[:-1] == shape[:-1]
            and mx.issubdtype(self.inputs.dtype, mx.floating)
        )


def _adapts(call: _Call) -> bool:
    """True for an adapter around a linear layer, as mlx-lm has them."""
    inner = call.module.get("linear")
    return "lora_a" in call.module and isinstance(inner, nn.Linear | nn.QuantizedLinear)


def _calls(model: nn.Module, tokens: mx.array) -> tuple[object, list[_Call]]:
    """The answer of a model to tokens, and the calls of its modules, nothing evaluated."""
    calls: list[_Call] = []
    order = iter(range(1 << 62))
    stream = thread_stream()

    def note(call: ModuleCall) -> object:
        began, key = next(order), stream[0]
        output = call.run()
        calls.append(_Call(call.module, call.name, call.inputs, output, began, next(order), stream[0] is not key))
        return output

    with intercepted(model.modules(), note):
        return model(tokens), calls


def _with_logits(
    model: nn.Module, tokens: mx.array, head: SplitHead, logits: mx.array
) -> tuple[list[mx.array], object]:
    """The states that the layer is given, and what the model makes of other logits in place of its own."""
    given: list[mx.array] = []

    def instead(call: ModuleCall) -> object:
        if call.name != head._method:
            return call.run()
        assert call.inputs is not None
        given.append(call.inputs)
        return logits

    with intercepted([head.layer], instead):
        return given, model(tokens)


def _with_shape(model: nn.Module, tokens: mx.array, head: SplitHead) -> SplitHead | str:
    """The same with scale and cap; or the reason why it is something else that the model does."""
    import numpy as np

    reason = f"what it does to the logits of {head.path!r} is neither a scale nor a cap"
    shape = (*tokens.shape, head.vocabulary)
    given = np.resize(np.array(_LOGITS, np.float32), shape).reshape(-1)
    np.random.default_rng(0).shuffle(given)
    try:
        made = _with_logits(model, tokens, head, mx.array(given.reshape(shape)))[1]
        assert isinstance(made, mx.array)
        found = np.array(made.astype(mx.float32), np.float64).reshape(-1)
    except Exception as error:
        return f"{reason} ({type(error).__name__}: {error})"
    if found.size != given.size:
        return reason
    values, places = np.unique(given, return_index=True)
    scale, softcap = _scale_and_cap(dict(zip(values.tolist(), found[places].tolist(), strict=True)))
    if scale is None:
        return reason
    one = abs(scale - 1) < 1e-6
    split = SplitHead(head.path, None if one else scale, softcap, head.vocabulary, head.layer, head._method)
    expected = np.array(finished(mx.array(given), split.scale, split.softcap), np.float64).reshape(-1)
    return split if np.allclose(found, expected, rtol=1e-5, atol=0) else reason


def _scale_and_cap(at: dict[float, float]) -> tuple[float | None, float | None]:
    """Scale and cap from logits and what became of them; no scale where it is neither."""
    largest = at.get(max(_LOGITS), 0.0)
    if not 0 < largest < math.inf:
        return None, None
    if largest > 1e10:
        return at.get(1.0), None
    small = [x for x in at if x > 0 and 0 < at[x] < _UNCAPPED * largest]
    if not small:
        return None, None
    x = max(small)
    return largest * math.atanh(at[x] / largest) / x, largest
