"""The outcome of a step: a loss that is none, an allocation that failed, the work in a batch."""

from __future__ import annotations

from typing import Any

from mlx_tune.errors import MlxTuneError
from mlx_tune.trees import arrays_of

#: Texts of the errors by which MLX's allocators refuse; anything else that a step raises is the user's to see.
_OUT_OF_MEMORY = ("out of memory", "unable to allocate", "maximum allowed buffer size", "insufficient memory")


def fault_of(loss: Any) -> str | None:
    """The fault of a loss, in words with `{size}` for its batch size, or None."""
    import mlx.core as mx

    values = loss.astype(mx.float32)
    if not bool(mx.all(mx.isfinite(values))):
        return (
            "The loss at batch size {size} is not finite. Check that step returns the loss first, and that the first "
            "steps do not diverge on this batch."
        )
    if not bool(mx.any(values != 0)):
        return (
            "The loss at batch size {size} is zero. A step that ran out of memory leaves zeros on some versions of "
            "MLX (mlx#4134), so a zero proves nothing. Check that step returns the loss first."
        )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """True where an exception is one by which an allocator of MLX refuses."""
    if isinstance(error, MlxTuneError):
        return False  # ours, though its text may speak of memory
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(part in text for part in _OUT_OF_MEMORY)


def count_items(batch: object, size: int) -> tuple[int, str]:
    """The work in a batch: its tokens where its first array is `[batch, length]` of integers, else its rows."""
    import mlx.core as mx

    arrays = list(arrays_of(batch))
    if arrays and arrays[0].ndim == 2 and mx.issubdtype(arrays[0].dtype, mx.integer):
        return int(arrays[0].size), "tokens"
    return size, "rows"


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its name where it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
