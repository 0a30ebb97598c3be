"""Equivalents for operations that MLX cannot export: the same arrays, of the same sizes, kept for as long.

Each is used only in a step whose export was refused because of its operation, and is named in the estimate. Values are
of no interest here, only what is allocated and what is held for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_tune.graphs.tracing.custom_gradients import Marks, called_with_gradient
from mlx_tune.graphs.tracing.recomputation import traced_checkpoint
from mlx_tune.graphs.tracing.replaced_calls import StandIn


def gather_mm(
    original: Callable[..., mx.array], marks: Marks, a: mx.array, b: mx.array, *args: object, **kwargs: Any
) -> mx.array:
    """Expert products of sorted tokens, whose weight gradient is SegmentedMM.

    That reads two matrices and the ends of the segments, copies a matrix that does not lie plain or transposed, and
    makes one matrix for each expert: what a gathered product of the same two matrices does as well.
    """
    experts = kwargs.get("rhs_indices", args[1] if len(args) > 1 else None)
    lhs = kwargs.get("lhs_indices", args[0] if args else None)
    rows = lhs is None and experts is not None and b.ndim == 3 and a.ndim == 3 and a.shape[0] == experts.size
    if not rows or not kwargs.get("sorted_indices", False):
        return original(a, b, *args, **kwargs)

    def gradient(before: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        a, b = before
        counts = mx.zeros((b.shape[0],), mx.uint32).at[experts].add(a.shape[1])
        ends = mx.cumsum(counts, inclusive=True)
        flat = [cotangent.flatten(0, -2).swapaxes(0, 1)[None], a.flatten(0, -2)[None]]
        weight = original(*flat, lhs_indices=ends, rhs_indices=ends)
        return [original(cotangent, b.swapaxes(-1, -2), *args, **kwargs), weight.swapaxes(-1, -2)]

    y: mx.array = called_with_gradient(lambda a, b: original(a, b, *args, **kwargs), gradient, (a, b), {}, marks)
    return y


def cross_entropy(
    _: Callable[..., mx.array], __: Marks, logits: mx.array, targets: mx.array, *args: object, **kwargs: object
) -> mx.array:
    """The fused loss of a GPU: nothing of the logits' size in the forward pass, one such array in the backward."""
    score = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    return (mx.logsumexp(logits, axis=-1) - mx.stop_gradient(score)).astype(mx.float32)


def attention(
    original: Callable[..., mx.array], _: Marks, q: mx.array, k: mx.array, v: mx.array, *args: object, **kwargs: object
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


def unfused(original: Callable[..., mx.array], _: Marks, *args: object, **kwargs: object) -> mx.array:
    """An operation of `mx.fast` as the CPU has it, where it is made of others: the same arrays, and some in between."""
    return original(*args, **kwargs | {"stream": mx.cpu})


def contiguous(_: Callable[..., mx.array], __: Marks, a: mx.array, *args: object, **kwargs: object) -> mx.array:
    """A view where the array lies in a row, else a copy, as reshapes make them."""
    return a.reshape(-1).reshape(a.shape)


#: The primitive that the exporter refuses, and what to do about it.
STAND_INS: dict[str, StandIn] = {
    "SegmentedMM": StandIn(mx, "gather_mm", gather_mm, "its weight gradient as one gathered product"),
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
