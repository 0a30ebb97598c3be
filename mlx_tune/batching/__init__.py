"""The largest batch that fits a memory budget, found from below."""

from mlx_tune.batching.autobatch import autobatch
from mlx_tune.batching.result import AutobatchResult, Trial

__all__ = ["AutobatchResult", "Trial", "autobatch"]
