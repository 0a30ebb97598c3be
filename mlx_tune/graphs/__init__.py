"""A training step as a graph of shapes: what it allocates, and when, with nothing evaluated."""

from mlx_tune.graphs.arguments import ArraySpec
from mlx_tune.graphs.estimate import MemoryEstimate, PeakOwner, estimate_memory
from mlx_tune.graphs.tracing.recomputation import is_tracing, traced_checkpoint

__all__ = ["ArraySpec", "MemoryEstimate", "PeakOwner", "estimate_memory", "is_tracing", "traced_checkpoint"]
