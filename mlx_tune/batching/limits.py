"""The pair of limits that a trial, and then training, runs under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_tune.interrupts import uninterrupted
from mlx_tune.memory import memory_limit


@contextmanager
def held(limit_bytes: int, cache_limit_bytes: int | None) -> Iterator[None]:
    """Hold MLX's memory limit, and its cache limit where one is given, while the block runs.

    On Metal and CUDA the allocator itself releases cached buffers before active and cached bytes together exceed
    the memory limit. The CPU allocator keeps up to its cache limit whatever else is held, so there the cache gets
    a limit of its own.

    Args:
        limit_bytes: The memory limit.
        cache_limit_bytes: The cache limit, or None to leave it alone.
    """
    import mlx.core as mx

    with memory_limit(limit_bytes):
        if cache_limit_bytes is None:
            yield
            return
        with uninterrupted():
            before = cache_limit()
        try:
            mx.set_cache_limit(cache_limit_bytes)
            yield
        finally:
            mx.set_cache_limit(before)


def cache_limit() -> int:
    """The cache limit in force; MLX only tells it to whoever sets it."""
    import mlx.core as mx

    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit
