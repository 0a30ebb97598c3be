"""Equivalents for operations that MLX cannot export: the same arrays, of the same sizes, kept for as long.

Each is used only in a step whose export was refused because of its operation, and is named in the estimate. Values are
of no interest here, only what is allocated and what is held for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_tune.graphs.recomputation import traced_checkpoint


@dataclass(frozen=True)
class StandIn:
    """The function to call instead of `owner.name`, which it takes first, and its description in words."""

    owner: Any
    name: str
    function: Callable[..., Any]
    words: str


def gather_mm(original: Callable[..., Any], a: mx.array, b: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    """Expert products of sorted tokens, whose weight gradient is SegmentedMM.

    The sizes are those of tokens spread evenly over the experts: one batched product and its two gradients.
    """
    lhs = kwargs.get("lhs_indices", args[0] if args else None)
    if not kwargs.get("sorted_indices", False) or lhs is not None or b.ndim != 3 or a.ndim != 3:
        return original(a, b, *args, **kwargs)
    experts, rows = b.shape[0], a.shape[0] * a.shape[1]
    flat = a.reshape(rows, a.shape[2])
    missing = -rows % experts
    if missing:
        flat = mx.concatenate([flat, *[flat[:1]] * missing])
    product = flat.reshape(experts, -1, a.shape[2]) @ b
    return product.reshape(-1, b.shape[2])[:rows].reshape(*a.shape[:2], b.shape[2])


def cross_entropy(_: Callable[..., Any], logits: mx.array, targets: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    """The fused loss of a GPU: nothing of the logits' size in the forward pass, one such array in the backward."""
    score = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return (mx.logsumexp(logits, axis=-1) - mx.stop_gradient(score)).astype(mx.float32)


def attention(
    original: Callable[..., Any], q: mx.array, k: mx.array, v: mx.array, *args: Any, **kwargs: Any
) -> mx.array:
    """Fused attention of a GPU: queries, keys, values and output are held; each gradient is one array of its size."""

    def pure(q: mx.array, k: mx.array, v: mx.array) -> list[mx.array]:
        if not forward:
            forward.append(True)
            return [original(q, k, v, *args, **kwargs)]
        out = mx.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
        for x in (q, k, v):
            out = out + (x * mx.stop_gradient(x)).sum()
        return [out]

    forward: list[bool] = []
    return traced_checkpoint(pure, [q, k, v])[0]


def unfused(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """An operation of `mx.fast` as the CPU has it, where it is made of others: the same arrays, and some in between."""
    return original(*args, **kwargs | {"stream": mx.cpu})


def contiguous(_: Callable[..., Any], a: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    """A view where the array lies in a row, else a copy, as reshapes make them."""
    return a.reshape(-1).reshape(a.shape)


#: The primitive that the exporter refuses, and what to do about it.
STAND_INS: dict[str, StandIn] = {
    "SegmentedMM": StandIn(mx, "gather_mm", gather_mm, "tokens spread evenly over the experts, as one batched product"),
    "CrossEntropy": StandIn(mx.fast, "cross_entropy", cross_entropy, "log-sum-exp minus the target's score"),
    "CrossEntropyVJP": StandIn(mx.fast, "cross_entropy", cross_entropy, "log-sum-exp minus the target's score"),
    "ScaledDotProductAttentionVJP": StandIn(
        mx.fast, "scaled_dot_product_attention", attention, "attention whose gradients are one array each"
    ),
    **dict.fromkeys(
        ("GatedDeltaUpdate", "GatedDeltaUpdateVJP"),
        StandIn(mx.fast, "gated_delta_update", unfused, "made of single operations, as on a CPU, which hold more"),
    ),
    "Contiguous": StandIn(mx, "contiguous", contiguous, "two reshapes, which copy where it would"),
}
