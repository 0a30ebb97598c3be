"""Cross-entropy straight from hidden states, a few tokens' logits at a time.

The logits of a large vocabulary are the largest thing that a training step holds once its blocks are checkpointed. Here
tokens are taken in chunks, each chunk's gradient is made while its logits are there (Liger Kernel, Hsu et al., 2024,
https://arxiv.org/abs/2410.10989), and the next chunk waits for it: MLX would otherwise run all forward passes first,
since nothing tells it not to.
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


def linear_cross_entropy(
    hidden: mx.array,
    head: nn.Module | mx.array,
    targets: mx.array,
    *,
    weights: mx.array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> mx.array:
    """Cross-entropy of a linear head, without ever holding the logits of more than one chunk of tokens.

    Value and gradients are those of `nn.losses.cross_entropy(head(hidden).astype(mx.float32), targets, ...)`, with
    logits multiplied by `scale` and capped before. Gradients are made with the loss, so that a frozen head costs the
    two products that it costs anyway; a head in evaluation mode has its loss alone computed.

    Args:
        hidden: `[..., width]`, the states that the head is given.
        head: The layer that makes logits, quantized or with adapters or neither; an embedding, whose table is used as
            its `as_linear` does; or a weight `[vocabulary, width]`.
        targets: Whole numbers `[...]`, the index of each token's target.
        weights: `[...]`, multiplies each token's loss. All ones by default.
        softcap: Caps logits at `softcap * tanh(logits / softcap)`, as Gemma does.
        scale: Multiplies logits before that, as Cohere and Granite do.
        label_smoothing: Share of the target that is spread over the vocabulary, from 0 up to 1, exclusively.
        reduction: "mean" over all tokens, as MLX takes it (weights do not count), "sum" or "none".
        chunk_tokens: Tokens whose logits are there at a time; by default what makes them an eighth of all, and some
            130 MB at the most.

    Returns:
        A scalar, or `[...]` with "none", in float32.

    Raises:
        InvalidArgumentError: Shapes that do not go together, targets that are no whole numbers, a head of another kind,
            an unknown reduction, or a call under `mx.vmap`.
        TraceError: The gradient of a gradient was asked for.

    Examples:
        >>> head = nn.Linear(16, 1000, bias=False)
        >>> hidden, targets = mx.random.normal((2, 8, 16)), mx.random.randint(0, 1000, (2, 8))
        >>> loss = linear_cross_entropy(hidden, head, targets)
        >>> plain = nn.losses.cross_entropy(head(hidden), targets, reduction="mean")
        >>> mx.allclose(loss, plain, rtol=1e-5).item()
        True
    """
    _check(hidden, targets, weights, label_smoothing, reduction)
    layer, shape = Head(head), targets.shape
    states, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    tokens = wanted.size
    vocabulary = _vocabulary(layer, states, head)
    chunk = whole_number(chunk_tokens, "chunk_tokens", least=1) if chunk_tokens is not None else None

    def losses_of(logits: mx.array, at: slice) -> mx.array:
        return nn.losses.cross_entropy(finished(logits, scale, softcap), wanted[at], label_smoothing=label_smoothing)

    work = _Chunks(layer, losses_of, tokens, chunk or _default_chunk(tokens, vocabulary))
    each = mx.ones((tokens,)) if weights is None else weights.reshape(-1).astype(mx.float32)
    if reduction == "none":
        losses = work.each(states)
        return (losses if weights is None else losses * each).reshape(shape)
    return work.total(states, each / tokens if reduction == "mean" else each)


def linear_log_probs(
    hidden: mx.array,
    head: nn.Module | mx.array,
    targets: mx.array,
    *,
    softcap: float | None = None,
    scale: float | None = None,
    chunk_tokens: int | None = None,
) -> mx.array:
    """Log-probabilities of given tokens under a linear head, a chunk of tokens at a time.

    For losses of preference such as DPO, and for scoring text.

    Args:
        hidden: `[..., width]`, the states that the head is given.
        head: As for `linear_cross_entropy`.
        targets: Whole numbers `[...]`, the tokens.
        softcap: As for `linear_cross_entropy`.
        scale: As for `linear_cross_entropy`.
        chunk_tokens: As for `linear_cross_entropy`.

    Returns:
        `[...]` in float32, natural logarithms.

    Raises:
        InvalidArgumentError: As `linear_cross_entropy`.

    Examples:
        >>> hidden, head = mx.random.normal((3, 16)), nn.Linear(16, 100)
        >>> bool((linear_log_probs(hidden, head, mx.array([1, 2, 3])) < 0).all().item())
        True
    """
    return -linear_cross_entropy(
        hidden, head, targets, softcap=softcap, scale=scale, reduction="none", chunk_tokens=chunk_tokens
    )


def finished(logits: mx.array, scale: float | None, softcap: float | None) -> mx.array:
    """Logits multiplied by a scale, then capped, where there is either."""
    logits = logits if scale is None else logits * scale
    return logits if softcap is None else mx.tanh(logits / softcap) * softcap


class _Chunks:
    """Loss and gradients, summed over chunks of tokens in order.

    Args:
        head: The head.
        losses_of: The losses of a chunk `[chunk]`, from its logits in float32 and its place.
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
            logits = self._head.logits(arrays, _after(states[at], parts[-1:])).astype(mx.float32)
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
            part = _after(states[at], [*losses[-1:], *gradients[-1:], *sums])

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


def _after(array: mx.array, done: list[mx.array]) -> mx.array:
    """The same array, not computed with before others are done."""
    if not done:
        return array
    ordered: Any = mx.depends([array], done)
    return cast("mx.array", ordered[0])


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


def _check(
    hidden: mx.array, targets: mx.array, weights: mx.array | None, label_smoothing: float, reduction: str
) -> None:
    if hidden.ndim < 1 or hidden.shape[:-1] != targets.shape:
        raise InvalidArgumentError(
            f"hidden {list(hidden.shape)} and targets {list(targets.shape)} do not go together: "
            "[..., width] and [...] do."
        )
    if not targets.size:
        raise InvalidArgumentError(f"targets {list(targets.shape)} hold no tokens: there is no loss of none.")
    if not mx.issubdtype(targets.dtype, mx.integer):
        raise InvalidArgumentError(f"targets of {targets.dtype}: give the index of each token's target.")
    if weights is not None and weights.shape != targets.shape:
        raise InvalidArgumentError(
            f"weights {list(weights.shape)} for targets {list(targets.shape)}: one for each is needed."
        )
    if not 0 <= label_smoothing < 1:
        raise InvalidArgumentError(f"label_smoothing={label_smoothing!r}: from 0 up to 1, exclusively.")
    if reduction not in ("mean", "sum", "none"):
        raise InvalidArgumentError(f"reduction={reduction!r}: there are 'mean', 'sum' and 'none'.")
