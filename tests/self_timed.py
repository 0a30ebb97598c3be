"""Models that say themselves how long they take."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class Says(nn.Module):
    """Its answer is the seconds that it takes: so many for a token."""

    def __init__(self, each: float) -> None:
        super().__init__()
        self.each = each

    def __call__(self, x: mx.array) -> float:
        return self.each * x.shape[1]


def believed(run):
    """The seconds that a model says it takes."""
    return run()
