"""Reading arrays that MLX has not made yet, such as weights of a lazily loaded file, without keeping them."""

from __future__ import annotations

import mlx.core as mx

from mlx_tune.upstream import is_lazy


def read_array(array: mx.array) -> mx.array:
    """The array's values in a new handle, evaluated; an unevaluated array stays unevaluated.

    Evaluating an array of a lazily loaded file keeps its values for as long as the array lives, that is in the
    model. Compiling a function that captures it copies the graph above it, file reads included, so what is
    evaluated is the copy, which goes when the caller lets go of it. Of an array with values already, the result
    shares the memory.

    Args:
        array: Any array.

    Returns:
        An evaluated array of the same shape, dtype and values.

    Examples:
        >>> x = mx.ones(3) + 1
        >>> read_array(x).tolist(), is_lazy(x)
        ([2.0, 2.0, 2.0], True)
    """
    if not is_lazy(array):
        return array
    # Output arrays themselves are not copied by mx.compile, their inputs are; so one harmless operation on top.
    copy = mx.compile(lambda: mx.stop_gradient(array))()
    mx.eval(copy)
    return copy
