"""Half precision on the CPU backend, where MLX's matrix products do not go through BLAS as those of float32 do."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import cache

from mlx_tune.devices import computes_on_cpu
from mlx_tune.progress import Bar
from mlx_tune.trees import arrays_once
from mlx_tune.units import dtype_name

_HALVES = ("bfloat16", "float16")

#: From here on it is worth a word: below, less memory is reason enough for half precision.
_WORTH_SAYING = 1.5

#: Width of the square matrices that are multiplied for the measurement, which takes some 50 ms.
_WIDTH = 256


def slow_half_precision(
    state: object, bar: Bar | None = None, *, slower: Callable[[str], float] | None = None
) -> list[str]:
    """Say that training in half precision is slow here, where it is.

    Args:
        state: Objects that a step changes, the model among it: the dtype of most of its numbers counts.
        bar: Shows the same at once.
        slower: The time of a product in a dtype, by its name, over that in float32; measured by default.

    Returns:
        One sentence, or none: on a GPU, in float32, or where a short measurement finds no great difference.

    Examples:
        >>> import mlx.core as mx
        >>> slow_half_precision([mx.zeros((4, 4), mx.float32)])
        []
    """
    if not computes_on_cpu():
        return []
    sizes: Counter[str] = Counter()
    for array in arrays_once(state):
        sizes[dtype_name(array.dtype)] += array.size
    dtype = max(sizes, key=sizes.__getitem__, default="")
    if dtype not in _HALVES:
        return []
    ratio = (slower or times_slower)(dtype)
    if ratio < _WORTH_SAYING:
        return []
    text = (
        f"Most numbers here are {dtype}, and MLX computes on the CPU: a matrix product took {ratio:.0f} times as long "
        f"as in float32 (measured, {_WIDTH} x {_WIDTH}). In float32 (model.set_dtype(mx.float32)) steps are quicker "
        "and need more memory."
    )
    if bar is not None:
        bar.say(text)
    return [text]


@cache
def times_slower(dtype: str) -> float:
    """The time of a matrix product in a dtype over that in float32, measured once in a process."""
    import mlx.core as mx

    def seconds(kind: mx.Dtype) -> float:
        a = mx.ones((_WIDTH, _WIDTH), kind)
        mx.eval(a @ a)
        taken = []
        for _ in range(2):
            started = time.perf_counter()
            mx.eval(a @ a)
            taken.append(time.perf_counter() - started)
        return min(taken)

    return seconds(getattr(mx, dtype)) / seconds(mx.float32)
