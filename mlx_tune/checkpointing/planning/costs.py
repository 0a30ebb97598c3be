"""The cost of checkpointing a block: the seconds of one more forward pass, measured once for each kind of block.

Blocks of one class, with parameters of the same shapes, that are called with the same shapes, are one kind: they
do the same work. The arguments of their calls are learnt while a step is traced, when nothing is computed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_tune.errors import CheckpointError
from mlx_tune.graphs.arguments import ArraySpec
from mlx_tune.interrupts import interruptible
from mlx_tune.substitution import subclass, substituted
from mlx_tune.trees import arrays_of

#: How often a block's forward pass is timed at most; the fastest counts.
RUNS = 5


@dataclass
class Calls:
    """The calls of one block while a step was traced.

    Attributes:
        inputs: For each call its positional and named arguments, arrays replaced by `ArraySpec`.
        first: The number of calls of blocks before this block's first one.
    """

    inputs: list[tuple[tuple[object, ...], dict[str, object]]] = field(default_factory=list)
    first: int = -1


@contextmanager
def recorded(blocks: Mapping[str, nn.Module]) -> Iterator[dict[str, Calls]]:
    """Note how blocks are called while the body runs; they are as before afterwards.

    Args:
        blocks: Modules under the names to note them by. None may be checkpointed.

    Yields:
        For each name its calls.
    """
    calls = {path: Calls() for path in blocks}
    count = itertools.count()

    def recording(kind: Any, noted: Calls) -> Any:
        def __call__(self: Any, *args: object, **kwargs: object) -> object:  # noqa: N807
            noted.inputs.append((_shapes(args), _shapes(kwargs)))
            order = next(count)
            noted.first = order if noted.first < 0 else noted.first
            return kind.__call__(self, *args, **kwargs)

        return subclass(kind, {"__call__": __call__})

    with substituted((block, recording(type(block), calls[path])) for path, block in blocks.items()):
        yield calls


def _shapes(tree: object) -> Any:
    return tree_map(lambda a: ArraySpec(tuple(a.shape), a.dtype) if isinstance(a, mx.array) else a, tree)


def block_kind(block: nn.Module, calls: Calls) -> tuple[Any, ...]:
    """The common key of two blocks that do the same work.

    Args:
        block: The module.
        calls: Its calls.

    Returns:
        A key: the class, every parameter's name, shape and type and whether it is trained, and the calls' arguments.
    """
    trained = {name for name, _ in _leaves(block.trainable_parameters())}
    parameters = tuple((n, tuple(a.shape), str(a.dtype), n in trained) for n, a in _leaves(block.parameters()))
    arguments = tuple(
        tuple(_described(leaf) for _, leaf in _leaves([list(args), dict(kwargs)])) for args, kwargs in calls.inputs
    )
    return type(block), parameters, arguments


def _leaves(tree: object) -> list[tuple[str, Any]]:
    # MLX's stubs know of the form that returns a dictionary too.
    return cast(list[tuple[str, object]], tree_flatten(tree))


def _described(leaf: object) -> str:
    # Objects such as caches are told apart by their class: their addresses differ from block to block.
    return repr(leaf) if isinstance(leaf, (ArraySpec, str, int, float, bool, type(None))) else type(leaf).__name__


def forward_seconds(path: str, block: nn.Module, calls: Calls) -> float:
    """Time a block's forward passes in one step, on made-up inputs of the shapes it is called with.

    Args:
        path: Its name, for the error.
        block: The module, not checkpointed.
        calls: Its calls.

    Returns:
        Seconds of all its calls in one step.

    Raises:
        CheckpointError: The block cannot be run on inputs of these shapes alone.
    """
    total = 0.0
    for args, kwargs in calls.inputs:
        filled_args, filled_kwargs = tree_map(_filled, list(args)), tree_map(_filled, dict(kwargs))
        mx.eval(list(arrays_of((filled_args, filled_kwargs))))
        try:
            total += _fastest(block, filled_args, filled_kwargs)
        except Exception as error:
            raise CheckpointError(
                f"The time of {path} could not be measured: {type(block).__name__} does not run on its own on inputs "
                f"of the shapes it is called with, {_described_call(args, kwargs)} ({type(error).__name__}: {error}). "
                "Leave it out with select=."
            ) from error
    return total


def _fastest(block: nn.Module, args: list[object], kwargs: dict[str, object]) -> float:
    best = math.inf
    for turn in range(RUNS + 1):
        started = time.perf_counter()
        with interruptible():
            mx.eval(list(arrays_of([block(*args, **kwargs)])))
        seconds = time.perf_counter() - started
        if turn:  # the first compiles kernels and fills the cache
            best = min(best, seconds)
        if turn >= 2 and seconds * turn > 2.0:
            break
    return best


def _filled(leaf: object) -> object:
    """An array for a shape: small numbers, true, and zeros for indices, which exist in any table."""
    if not isinstance(leaf, ArraySpec):
        return leaf
    if mx.issubdtype(leaf.dtype, mx.floating):
        size = math.prod(leaf.shape)
        return mx.sin(mx.arange(size, dtype=mx.float32)).reshape(leaf.shape).astype(leaf.dtype)
    return mx.ones(leaf.shape, leaf.dtype) if leaf.dtype == mx.bool_ else mx.zeros(leaf.shape, leaf.dtype)


def _described_call(args: tuple[object, ...], kwargs: dict[str, object]) -> str:
    shown = [_described(leaf) for _, leaf in _leaves([list(args), dict(kwargs)])]
    return "(" + ", ".join(shown) + ")"
