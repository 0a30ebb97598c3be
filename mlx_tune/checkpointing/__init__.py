"""Gradient checkpointing: one block, the repeated blocks of a model, and proof that gradients stay the same."""

from mlx_tune.checkpointing.block.keep import keep
from mlx_tune.checkpointing.block.recompute import is_recomputing
from mlx_tune.checkpointing.block.wrap import checkpoint, is_checkpointed, uncheckpoint
from mlx_tune.checkpointing.blocks import CheckpointHandle, checkpoint_blocks, find_blocks
from mlx_tune.checkpointing.planning.checkpoint_plan import CheckpointPlan
from mlx_tune.checkpointing.planning.plan import plan_checkpoints
from mlx_tune.checkpointing.tile import TileHandle, is_tiled, tile, tile_blocks, untile
from mlx_tune.checkpointing.verify import verify_checkpoint
from mlx_tune.checkpointing.verify_report import GradientDifference, VerifyReport

__all__ = [
    "CheckpointHandle",
    "CheckpointPlan",
    "GradientDifference",
    "TileHandle",
    "VerifyReport",
    "checkpoint",
    "checkpoint_blocks",
    "find_blocks",
    "is_checkpointed",
    "is_recomputing",
    "is_tiled",
    "keep",
    "plan_checkpoints",
    "tile",
    "tile_blocks",
    "uncheckpoint",
    "untile",
    "verify_checkpoint",
]
