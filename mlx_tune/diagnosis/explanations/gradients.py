"""Errors of the backward pass."""

from __future__ import annotations

from mlx_tune.diagnosis.explanations.entry import MLX, Entry

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "A gradient through whole numbers",
        r"Cannot calculate VJP with respect to (indices|mask|boolean masks)|\[Primitive::vjp\] Not implemented for",
        "[gather] Cannot calculate VJP with respect to indices.",
        "A gradient is asked for something that has none: token ids, masks or random keys, passed as an argument of a "
        "function that is differentiated or checkpointed.",
        (
            "Use `mt.checkpoint`, which stops the gradients of such arguments; `mx.checkpoint` does not.",
            "Or wrap the argument: `mx.stop_gradient(ids)`.",
        ),
        (MLX + "blob/main/mlx/primitives.cpp",),
    ),
)
