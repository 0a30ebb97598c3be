"""Cross-entropy straight from hidden states, a few tokens' logits at a time.

The logits of a large vocabulary are the largest thing that a training step holds once its blocks are checkpointed. Here
tokens are taken in chunks, each chunk's gradient is made while its logits are there (Liger Kernel, Hsu et al., 2024,
https://arxiv.org/abs/2410.10989), and the next chunk waits for it.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.losses.chunks import chunked_loss
from mlx_tune.losses.heads import finished


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
    _check(hidden, targets, label_smoothing)
    wanted = targets.reshape(-1)

    def losses_of(logits: mx.array, at: slice) -> mx.array:
        if scale is None and softcap is None and not label_smoothing and mx.default_device() == mx.gpu:
            # The fused kernel adds up in float32, and needs no copy of the logits in it.
            return mx.fast.cross_entropy(logits, wanted[at])
        shaped = finished(logits.astype(mx.float32), scale, softcap)
        return nn.losses.cross_entropy(shaped, wanted[at], label_smoothing=label_smoothing)

    return chunked_loss(hidden, head, losses_of, weights=weights, reduction=reduction, chunk_tokens=chunk_tokens)


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


def _check(hidden: mx.array, targets: mx.array, label_smoothing: float) -> None:
    if hidden.ndim < 1 or hidden.shape[:-1] != targets.shape:
        raise InvalidArgumentError(
            f"hidden {list(hidden.shape)} and targets {list(targets.shape)} do not go together: "
            "[..., width] and [...] do."
        )
    if not targets.size:
        raise InvalidArgumentError(f"targets {list(targets.shape)} hold no tokens: there is no loss of none.")
    if not mx.issubdtype(targets.dtype, mx.integer):
        raise InvalidArgumentError(f"targets of {targets.dtype}: give the index of each token's target.")
    if not 0 <= label_smoothing < 1:
        raise InvalidArgumentError(f"label_smoothing={label_smoothing!r}: from 0 up to 1, exclusively.")
