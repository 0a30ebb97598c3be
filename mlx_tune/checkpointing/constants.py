"""Which arrays cannot have a gradient, because nothing that is differentiated leads to them.

MLX asks a function with a gradient of its own for the gradients of all of its inputs, and takes those it needs. Some
operations refuse some of them: `mx.fast.rope` its frequencies and `mx.fast.scaled_dot_product_attention` its mask on a
GPU, matrix decompositions everything. Such an input is a constant of the model, and the plain model never asks. MLX
does not tell Python which inputs are constants, but it writes graphs down.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from functools import cache

import mlx.core as mx

_LEAF = re.compile(r'\{ rank=source; "(\w+)"; \}')
_OPERATION = re.compile(r'\{ (\d+) \[label ="(.*)", shape=rectangle\]; \}')
_INPUT = re.compile(r'"(\w+)" -> (\d+)')
_OUTPUT = re.compile(r'(\d+) -> "(\w+)"')


def constants(arrays: Sequence[mx.array], among: Iterable[int]) -> set[int]:
    """Find the arrays that no tracer of a gradient leads to, or only past a `stop_gradient`.

    The arguments of a function that is differentiated are tracers, those too that it is not differentiated by.

    Args:
        arrays: Arrays, evaluated or not. The graph of each that is looked at is walked.
        among: The indices of those to look at.

    Returns:
        The indices of those that are certainly constant.

    Examples:
        >>> import mlx.core as mx
        >>> fixed = mx.ones((2,))
        >>> def loss(x):
        ...     print(constants([x, fixed, fixed * 2, x * fixed], range(4)))
        ...     return x.sum()
        >>> gradient = mx.grad(loss)(fixed)
        {1, 2}
    """
    names = {f"n{index}": index for index in among}
    text = io.StringIO()
    mx.export_to_dot(text, **{name: arrays[index] for name, index in names.items()})
    traced: set[str] = set()  # operations by number, arrays by name
    stopped: set[str] = set()
    found: set[int] = set()
    for line in text.getvalue().splitlines():
        # Operations come after everything that leads to them.
        if match := _LEAF.fullmatch(line):
            name = match[1]
        elif match := _OPERATION.fullmatch(line):
            if _tracer() in ("", match[2]):
                traced.add(match[1])
            if match[2] == "StopGradient":
                stopped.add(match[1])
            continue
        elif match := _INPUT.fullmatch(line):
            if match[1] in traced and match[2] not in stopped:
                traced.add(match[2])
            continue
        elif match := _OUTPUT.fullmatch(line):
            if match[1] in traced:
                traced.add(match[2])
                continue
            name = match[2]
        else:
            continue
        if name in names:
            found.add(names[name])
    return found


@cache
def _tracer() -> str:
    """The operation by which MLX marks what is differentiated; empty where that cannot be told."""
    text = io.StringIO()

    def look(x: mx.array) -> mx.array:
        mx.export_to_dot(text, x)
        return x

    mx.grad(look)(mx.array(0.0))
    found = _OPERATION.search(text.getvalue())
    return found[2] if found else ""
