"""Keys and values of an unloaded model: mlx-lm's own caches, filled with arrays that are never evaluated."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.generation import quantized_caches

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

Caches = list[Any]
#: Where an array is held: by what, and under which key.
Place = tuple[Any, Any, "mx.array"]
#: Tokens of a prompt that mlx-lm reads at a time.
PREFILL = 2048


def filled_caches(
    model: nn.Module,
    rows: int,
    tokens: int,
    more: int = 0,
    *,
    exact: bool = False,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
) -> Caches:
    """The caches of some rows after so many tokens, as mlx-lm's batch generator holds them.

    Args:
        model: The model.
        rows: Rows of the batch.
        tokens: Tokens of each that were read; 0 for none.
        more: Tokens that were read after those.
        exact: True for caches that had no room for these, as they are when rows have just been joined.
        kv_bits: Bits of keys and values; None for the model's own dtype.
        kv_group_size: Values that share a scale.

    Raises:
        InvalidArgumentError: A cache that mlx-lm cannot batch, or not quantize.
    """
    from mlx_lm.models.cache import make_prompt_cache

    if kv_bits is None:
        caches = _batched(model, rows)
    else:
        caches = quantized_caches(make_prompt_cache(model), kv_bits, kv_group_size)
    # A cache that rotates looks different after a long read; the last read says how it stays.
    for part in (tokens - PREFILL, min(tokens, PREFILL)):
        if part > 0:
            _read(model, caches, rows, part)
    if exact:
        for cache in caches:
            _trim(cache)
    if more:
        _read(model, caches, rows, more)
    return caches


def _trim(cache: Any) -> None:
    """Take the room for further tokens from a cache that was joined."""
    import mlx.core as mx

    for inner in getattr(cache, "caches", ()):
        _trim(inner)
    if type(cache).__name__ == "BatchKVCache" and cache.keys is not None:
        cache.keys, cache.values = (
            mx.zeros((*array.shape[:2], cache._idx, array.shape[3]), array.dtype)
            for array in (cache.keys, cache.values)
        )


def _read(model: nn.Module, caches: Caches, rows: int, tokens: int) -> None:
    """Let a model read tokens, and forget how its caches came about: only their shapes count."""
    import mlx.core as mx

    model(mx.zeros((rows, tokens), mx.int32), cache=caches)
    for holder, key, array in list(_arrays(caches)):
        if _holds(array):
            holder[key] = mx.zeros(array.shape, array.dtype)


def _holds(array: mx.array) -> bool:
    """True for keys, values and states; positions and paddings, one for each row, are read by caches and stay."""
    import mlx.core as mx

    return mx.issubdtype(array.dtype, mx.floating) or array.ndim > 1


def _batched(model: nn.Module, rows: int) -> Caches:
    from mlx_lm.generate import _merge_caches
    from mlx_lm.models.cache import make_prompt_cache

    try:
        merged: Caches = _merge_caches([make_prompt_cache(model) for _ in range(rows)])
    except (ValueError, NotImplementedError) as error:
        raise InvalidArgumentError(f"mlx-lm's batch generator does not take this model's cache: {error}.") from error
    return merged


def cache_arrays(caches: Caches) -> list[mx.array]:
    """The arrays of caches that hold keys, values and states, in order."""
    return [array for _, _, array in _arrays(caches) if _holds(array)]


def with_arrays(caches: Caches, arrays: list[mx.array]) -> Caches:
    """Copies of caches with other arrays in the same places."""
    import mlx.core as mx

    # Positions are changed in place by some caches: a copy has its own.
    own = {id(array): array if _holds(array) else mx.array(array) for _, _, array in _arrays(caches)}
    copies = copy.deepcopy(caches, own)
    places = [(holder, key) for holder, key, array in _arrays(copies) if _holds(array)]
    for (holder, key), array in zip(places, arrays, strict=True):
        holder[key] = array
    return copies


def _arrays(node: Any) -> Iterator[Place]:
    """Every array below some caches: what holds it, under which key, and itself."""
    import mlx.core as mx

    members: list[Place]
    if isinstance(node, dict):
        members = [(node, key, value) for key, value in node.items()]
    elif isinstance(node, list):
        members = [(node, i, value) for i, value in enumerate(node)]
    elif hasattr(node, "__dict__"):
        members = [(vars(node), key, value) for key, value in vars(node).items()]
    else:
        return
    for holder, key, value in members:
        if isinstance(value, mx.array):
            yield holder, key, value
        elif isinstance(value, tuple) and any(isinstance(entry, mx.array) for entry in value):
            holder[key] = list(value)  # a tuple of mx.quantize: mlx-lm takes either
            yield from _arrays(holder[key])
        elif isinstance(value, tuple):
            for entry in value:
                yield from _arrays(entry)
        elif not isinstance(value, str | int | float | bool | type(None)):
            yield from _arrays(value)
