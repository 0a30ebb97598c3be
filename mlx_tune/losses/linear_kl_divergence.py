"""KL divergence from another model, straight from the states of both, a few tokens' logits at a time."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.losses.chunks import after, chunked_loss
from mlx_tune.losses.heads import finished


def linear_kl_divergence(
    hidden: mx.array,
    head: nn.Module | mx.array,
    reference_hidden: mx.array,
    reference: Callable[[mx.array], mx.array],
    *,
    weights: mx.array | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> mx.array:
    """KL divergence of a model from a reference, without ever holding the logits of more than one chunk of tokens.

    For distillation: neither the model's logits nor the reference's are ever there for all tokens.

    Args:
        hidden: `[..., width]`, the states that the model's head is given.
        head: As for `linear_cross_entropy`.
        reference_hidden: `[..., any width]`, the states that the reference's head is given.
        reference: Makes the reference's logits `[tokens, vocabulary]` of some of its states `[tokens, any width]`: its
            head, or a function that scales and caps as well. It gets no gradient.
        weights: `[...]`, multiplies each token's divergence. All ones by default.
        softcap: Of the model's logits, as for `linear_cross_entropy`.
        scale: Likewise.
        reduction: "mean" over all tokens (weights do not count), "sum" or "none".
        chunk_tokens: As for `linear_cross_entropy`.

    Returns:
        A scalar, or `[...]` with "none", in float32, in nats.

    Raises:
        InvalidArgumentError: Shapes or vocabularies that do not go together, or as `linear_cross_entropy`.
        TraceError: The gradient of a gradient was asked for.

    Examples:
        >>> teacher, student = nn.Linear(32, 1000), nn.Linear(16, 1000)
        >>> theirs, ours = mx.random.normal((2, 8, 32)), mx.random.normal((2, 8, 16))
        >>> bool((linear_kl_divergence(ours, student, theirs, teacher) > 0).item())
        True
    """
    if reference_hidden.shape[:-1] != hidden.shape[:-1] or hidden.ndim < 1:
        raise InvalidArgumentError(
            f"hidden {list(hidden.shape)} and reference_hidden {list(reference_hidden.shape)} do not go together: they "
            "are states of the same tokens."
        )
    theirs = reference_hidden.reshape(-1, reference_hidden.shape[-1])

    def losses_of(logits: mx.array, at: slice) -> mx.array:
        # Not before this chunk's turn: all chunks of the reference's logits would be made first.
        before = mx.stop_gradient(reference(after(theirs[at], [mx.stop_gradient(logits)]))).astype(mx.float32)
        if before.shape != logits.shape:
            raise InvalidArgumentError(
                f"head makes logits {list(logits.shape)} and reference {list(before.shape)} of the same tokens: the "
                "vocabularies must be one."
            )
        # Both normalized before the difference is taken: it is small where the models agree.
        ours = finished(logits.astype(mx.float32), scale, softcap)
        expected, found = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (before, ours))
        return (mx.exp(expected) * (expected - found)).sum(-1)

    return chunked_loss(hidden, head, losses_of, weights=weights, reduction=reduction, chunk_tokens=chunk_tokens)
