"""Nested arguments and results: finding their arrays, and putting others in their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.graphs.graph import ArraySpec


def leaves(tree: Any, label: str, around: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
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


def arrays_of(tree: Any) -> list[mx.array]:
    """Every array in a tree, in order."""
    return [leaf for _, leaf in leaves(tree, "")]


def with_arrays(tree: Any, arrays: Iterator[mx.array]) -> Any:
    """The same tree with every array or description replaced by the next of `arrays`; other leaves stay."""
    if isinstance(tree, (mx.array, ArraySpec)):
        return next(arrays)
    if isinstance(tree, dict):
        return {key: with_arrays(child, arrays) for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(with_arrays(child, arrays) for child in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(with_arrays(child, arrays) for child in tree)
    return tree
