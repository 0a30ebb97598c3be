"""Everything that rests on what MLX does not promise, in one place."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx

#: The attribute of a module with the names of its parameters that are not trained.
FROZEN = "_no_grad"

#: The kinds of functions that MLX's transformations give.
TRANSFORMED = frozenset({type(mx.compile(abs)), type(mx.checkpoint(abs)), mx.custom_function})


def referents(held: Any) -> list[Any]:
    """The objects that something of MLX holds, in the order in which it was given them, apart from its class."""
    return [thing for thing in gc.get_referents(held) if not isinstance(thing, type)]


def function_of(transformed: Any) -> Any:
    """The function inside what `mx.compile`, `mx.grad`, `mx.checkpoint` or `mx.custom_function` returned."""
    return referents(transformed)[0 if isinstance(transformed, mx.custom_function) else -1]
