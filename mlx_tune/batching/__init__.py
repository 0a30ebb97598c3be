"""The largest batch that fits a memory budget, found from below."""

from mlx_tune.batching.autobatch import autobatch, autobatch_by_length
from mlx_tune.batching.result import AutobatchResult, Trial

__all__ = ["AutobatchResult", "Trial", "autobatch", "autobatch_by_length"]
