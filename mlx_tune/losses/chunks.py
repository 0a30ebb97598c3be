"""Losses of logits, a few tokens' at a time: each chunk's gradient is made while its logits are there.

The next chunk waits for it: MLX would otherwise run all forward passes first, since nothing tells it not to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.checkpointing.block.randomness import draws_from, thread_stream
from mlx_tune.errors import InvalidArgumentError, TraceError
from mlx_tune.graphs.tracing.recomputation import is_tracing
from mlx_tune.losses.heads import Head
from mlx_tune.units import whole_number

#: Bytes of a chunk's logits in float32, of which three or four arrays are alive at a time.
_CHUNK_BYTES = 128 << 20
#: Chunks at the least, as far as they have that many tokens: one alone would hold as much as the plain loss, or more.
_LEAST_CHUNKS = 8
#: Tokens of a chunk at the least: fewer would leave a matrix product idle.
_LEAST_TOKENS = 64


def chunked_loss(
    hidden: mx.array,
    head: nn.Module | mx.array,
    losses_of: Callable[[mx.array, slice], mx.array],
    *,
    weights: mx.array | None,
    reduction: str,
    chunk_tokens: int | None,
) -> mx.array:
    """The loss of tokens, from their states and the head that makes their logits.

    Args:
        hidden: `[..., width]`, the states.
        head: As `Head` takes it.
        losses_of: The losses `[chunk]` of a chunk, in float32, from its logits `[chunk, vocabulary]` and its place
            among all tokens.
        weights: `[...]`, multiplies each token's loss; None for ones.
        reduction: "mean", "sum" or "none".
        chunk_tokens: Tokens in a chunk at the most; by default what `linear_cross_entropy` says.

    Returns:
        A scalar, or `[...]` with "none", in float32.

    Raises:
        InvalidArgumentError: Weights of another shape, no tokens, an unknown reduction, or a head that does not take
            the states.
    """
    shape = hidden.shape[:-1]
    if weights is not None and weights.shape != shape:
        raise InvalidArgumentError(f"weights {list(weights.shape)} for tokens {list(shape)}: one for each is needed.")
    if reduction not in ("mean", "sum", "none"):
        raise InvalidArgumentError(f"reduction={reduction!r}: there are 'mean', 'sum' and 'none'.")
    layer, states = Head(head), hidden.reshape(-1, hidden.shape[-1])
    tokens = states.shape[0]
    vocabulary = _vocabulary(layer, states, head)
    chunk = whole_number(chunk_tokens, "chunk_tokens", least=1) if chunk_tokens is not None else None
    work = _Chunks(layer, losses_of, tokens, chunk or _default_chunk(tokens, vocabulary))
    each = mx.ones((tokens,)) if weights is None else weights.reshape(-1).astype(mx.float32)
    if reduction == "none":
        losses = work.each(states)
        return (losses if weights is None else losses * each).reshape(shape)
    return work.total(states, each / tokens if reduction == "mean" else each)


def after(array: mx.array, done: Sequence[mx.array]) -> mx.array:
    """The same array, not computed with before others are done.

    Args:
        array: Any.
        done: The others; none leaves the array as it is.
    """
    if not done:
        return array
    ordered: Any = mx.depends([array], list(done))
    return cast("mx.array", ordered[0])


class _Chunks:
    """Loss and gradients, summed over chunks of tokens in order.

    Args:
        head: The head.
        losses_of: The losses of a chunk `[chunk]`, from its logits and its place.
        tokens: Their number.
        chunk: The most tokens at a time.
    """

    def __init__(
        self,
        head: Head,
        losses_of: Callable[[mx.array, slice], mx.array],
        tokens: int,
        chunk: int,
    ) -> None:
        self._head, self._losses_of = head, losses_of
        self._places = [slice(i, min(i + chunk, tokens)) for i in range(0, tokens, chunk)]

    def each(self, states: mx.array) -> mx.array:
        """The loss of every token, `[tokens]`."""
        key = thread_stream()[0]
        early = self._head.training

        def forward(states: mx.array, *arrays: mx.array) -> list[mx.array]:
            if not early:
                return [self._losses(states, arrays)]
            losses, gradient, _ = self._gradients(states, arrays, mx.ones((states.shape[0],)), ())
            return [losses, gradient]

        def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
            states, *arrays = primals
            with draws_from(key):
                _, late, of_arrays = self._gradients(states, arrays, cotangents[0], range(len(arrays)))
            early_one = _scaled(outputs[1], cotangents[0][:, None]) if early else late
            return [_first_order(x) for x in (early_one, *of_arrays)]

        return _custom(forward, backward)(states, *self._head.arrays)[0]

    def total(self, states: mx.array, weights: mx.array) -> mx.array:
        """The weighted sum of all tokens' losses; `weights` is `[tokens]`."""
        key = thread_stream()[0]
        early = self._head.training
        trained = [i for i, yes in enumerate(self._head.trained) if yes] if early else []

        def forward(states: mx.array, weights: mx.array, *arrays: mx.array) -> list[mx.array]:
            if not early:
                losses = self._losses(states, arrays)
                return [(losses * weights).sum(), losses]
            losses, gradient, of_arrays = self._gradients(states, arrays, weights, trained)
            return [(losses * weights).sum(), losses, gradient, *of_arrays]

        def backward(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
            states, weights, *arrays = primals
            by = cotangents[0]
            others = [i for i in range(len(arrays)) if i not in trained]
            with draws_from(key):
                # Evaluated only where it is asked for, as every array of MLX's.
                _, late, of_others = self._gradients(states, arrays, by * weights, others)
            found = dict(zip(others, of_others, strict=True)) | {
                i: _scaled(made, by) for i, made in zip(trained, outputs[3:], strict=True)
            }
            of_states = _scaled(outputs[2], by) if early else late
            results = [of_states, by * outputs[1], *(found[i] for i in range(len(arrays)))]
            return [_first_order(x) for x in results]

        return _custom(forward, backward)(states, weights, *self._head.arrays)[0]

    def _losses(self, states: mx.array, arrays: Sequence[mx.array]) -> mx.array:
        parts: list[mx.array] = []
        for at in self._places:
            logits = self._head.logits(arrays, after(states[at], parts[-1:]))
            parts.append(self._losses_of(logits, at))
        return mx.concatenate(parts)

    def _gradients(
        self, states: mx.array, arrays: Sequence[mx.array], cotangent: mx.array, wanted: Sequence[int]
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        """The losses, the gradient of the states, and those of the wanted arrays."""
        losses: list[mx.array] = []
        gradients: list[mx.array] = []
        sums: list[mx.array] = []
        for at in self._places:
            part = after(states[at], [*losses[-1:], *gradients[-1:], *sums])

            def of_logits(logits: mx.array, at: slice = at) -> mx.array:
                return self._losses_of(logits, at)

            loss, gradient, of_arrays = self._head.vjp(arrays, part, of_logits, cotangent[at], wanted)
            losses.append(loss)
            gradients.append(gradient)
            # Many small sums in half precision would lose what one product keeps.
            wide = [made.astype(mx.float32) for made in of_arrays]
            sums = [a + b for a, b in zip(sums, wide, strict=True)] if sums else wide
        stored = [total.astype(arrays[i].dtype) for i, total in zip(wanted, sums, strict=True)]
        return mx.concatenate(losses), mx.concatenate(gradients), stored


def _scaled(gradient: mx.array, by: mx.array) -> mx.array:
    return (gradient.astype(mx.float32) * by).astype(gradient.dtype)


def _custom(
    forward: Callable[..., list[mx.array]],
    backward: Callable[[list[mx.array], list[mx.array], list[mx.array]], list[mx.array]],
) -> Callable[..., list[mx.array]]:
    function = mx.custom_function(forward)

    @function.vjp
    def _(primals: object, cotangents: object, outputs: object) -> list[mx.array]:
        return backward(_listed(primals), _listed(cotangents), _listed(outputs))

    @function.vmap
    def _(*_: object) -> None:
        raise InvalidArgumentError(
            "linear_cross_entropy cannot be mapped by mx.vmap: it takes tokens with any number of leading axes at once."
        )

    return cast("Callable[..., list[mx.array]]", function)


def _listed(arrays: Any) -> list[mx.array]:
    """MLX hands on a single array bare."""
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)


def _first_order(gradient: mx.array) -> mx.array:
    """A gradient that is not differentiated again: what was made with the loss is a constant to MLX."""
    # Tracing asks every function of this kind for its gradient, and differentiates nothing.
    return gradient if is_tracing() else cast("mx.array", _differentiated_once(gradient))


@mx.custom_function
def _differentiated_once(gradient: mx.array) -> mx.array:
    return gradient


@_differentiated_once.vjp
def _(*_: object) -> mx.array:
    raise TraceError(
        "linear_cross_entropy has first derivatives only: use nn.losses.cross_entropy(head(hidden), targets) where the "
        "gradient of a gradient is needed."
    )


def _default_chunk(tokens: int, vocabulary: int) -> int:
    """Tokens in a chunk, a multiple of the least."""
    most = min(_CHUNK_BYTES // (4 * vocabulary), -(-tokens // _LEAST_CHUNKS))
    return max(1, most // _LEAST_TOKENS) * _LEAST_TOKENS


def _vocabulary(layer: Head, states: mx.array, head: object) -> int:
    """The head's outputs, from the shape of one token's logits, which are not computed."""
    try:
        with draws_from(mx.random.key(0)):  # a head may drop out: the stream is for logits that count
            return layer.logits(layer.arrays, mx.zeros((1, states.shape[-1]), dtype=states.dtype)).shape[-1]
    except ValueError as error:
        kind = f"array {list(head.shape)}" if isinstance(head, mx.array) else type(head).__name__
        width = states.shape[-1]
        raise InvalidArgumentError(f"hidden has a width of {width}, which {kind} does not take: {error}") from None
