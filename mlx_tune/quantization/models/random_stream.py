"""MLX's random stream, left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


@contextmanager
def same_random_stream() -> Iterator[None]:
    """Leave MLX's random stream as it was, whatever is drawn meanwhile."""
    key: Any = mx.random.state[0]  # type: ignore[index]
    high, low = (int(word) for word in key.tolist())
    try:
        yield
    finally:
        mx.random.seed((high << 32) | low)  # `seed` makes the key out of the two halves of its argument
