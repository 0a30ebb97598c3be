"""A step's arguments and results: arrays or their descriptions in any nesting, found and replaced."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx

from mlx_tune.errors import InvalidArgumentError

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class ArraySpec:
    """The shape and dtype of an array that need not exist.

    `estimate_memory` takes these wherever a step takes an array, at any depth of its arguments.

    Args:
        shape: The dimensions.
        dtype: object MLX dtype.

    Raises:
        InvalidArgumentError: `shape` is no sequence of whole numbers from 0 up, or `dtype` no MLX dtype.

    Examples:
        >>> import mlx.core as mx
        >>> ArraySpec((8, 4096), mx.int32).nbytes
        131072
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype

    def __post_init__(self) -> None:
        """Accept any sequence of whole numbers as the shape."""
        try:
            shape = tuple(operator.index(n) for n in self.shape)
        except TypeError:
            shape = (-1,)
        if any(n < 0 for n in shape):
            raise InvalidArgumentError(f"shape={self.shape!r}: give the dimensions, such as (8, 2048).")
        if not isinstance(self.dtype, mx.Dtype):
            raise InvalidArgumentError(f"dtype={self.dtype!r}: give one of MLX's, such as mx.float32.")
        object.__setattr__(self, "shape", shape)

    @property
    def nbytes(self) -> int:
        """Bytes of such an array."""
        return prod(self.shape) * self.dtype.size


Leaf: TypeAlias = mx.array | ArraySpec


def leaves(tree: object, label: str, around: frozenset[int] = frozenset()) -> Iterator[tuple[str, Leaf]]:
    """Every array or array description in a tree, with where it stands.

    Raises:
        InvalidArgumentError: The tree contains itself, so that there is no end to it.
    """
    if isinstance(tree, (dict, list, tuple)):
        if id(tree) in around:
            raise InvalidArgumentError(f"{label} is a {type(tree).__name__} that contains itself: pass one that ends.")
        around |= {id(tree)}
    if isinstance(tree, (mx.array, ArraySpec)):
        yield label, tree
    elif isinstance(tree, dict):
        for key, child in tree.items():
            yield from leaves(child, f"{label}.{key}", around)
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            yield from leaves(child, f"{label}[{i}]", around)


def argument_arrays(tree: object, label: str = "result") -> list[mx.array]:
    """Every array in a tree, in order."""
    return [leaf for _, leaf in leaves(tree, label) if isinstance(leaf, mx.array)]


def with_arrays(tree: Tree, arrays: Iterator[mx.array]) -> Tree:
    """The same tree with every array or description replaced by the next of `arrays`; other leaves stay."""

    def filled(node: object) -> Any:
        if isinstance(node, (mx.array, ArraySpec)):
            return next(arrays)
        if isinstance(node, dict):
            return {key: filled(child) for key, child in node.items()}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return type(node)(*map(filled, node))
        return type(node)(map(filled, node)) if isinstance(node, (list, tuple)) else node

    result: Tree = filled(tree)
    return result
