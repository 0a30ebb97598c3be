"""A training step as a graph of shapes: what it allocates, and when, with nothing evaluated."""

from mlx_tune.graphs.recomputation import is_tracing, traced_checkpoint

__all__ = ["is_tracing", "traced_checkpoint"]
