"""Keeping a model's memory resident: `wired_limit`, and the registry that makes overlapping uses safe."""

from mlx_tune.wiring.context import wired_limit

__all__ = ["wired_limit"]
