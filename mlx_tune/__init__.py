"""MLX memory, planned: checkpointing, the largest batch, quantization, wiring, and what each of them cost.

Everything public is importable from here. Names are looked up when they are first used, so that
`import mlx_tune` costs little more than `import mlx` itself.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from mlx_tune.version import __version__

# A library writes to its log, and leaves it to the program whether anybody reads it.
logging.getLogger(__name__).addHandler(logging.NullHandler())

#: The public API: each name and the module that holds it. A function that bears its module's name is fetched from that
#: module: type checkers would take the package's attribute for the module.
_HOMES = {
    # memory
    "track_memory": "memory",
    "memory_limit": "memory",
    "memory_budget": "memory",
    "MemoryBudget": "memory",
    "parse_bytes": "units",
    "format_bytes": "units",
    "estimate_memory": "graphs",
    "is_tracing": "graphs",
    "MemoryEstimate": "graphs",
    "ArraySpec": "graphs",
    "tightest_limit": "measuring.tightest_limit",
    "TightestLimit": "measuring.tightest_limit",
    # checkpointing
    "checkpoint": "checkpointing",
    "uncheckpoint": "checkpointing",
    "is_checkpointed": "checkpointing",
    "is_recomputing": "checkpointing",
    "checkpoint_blocks": "checkpointing",
    "plan_checkpoints": "checkpointing",
    "CheckpointPlan": "checkpointing",
    "verify_checkpoint": "checkpointing",
    "keep": "checkpointing.block.keep",
    "tile": "checkpointing.tile",
    "untile": "checkpointing",
    "is_tiled": "checkpointing",
    "tile_blocks": "checkpointing",
    # batch
    "autobatch": "batching.autobatch",
    "autobatch_by_length": "batching",
    "AutobatchResult": "batching",
    # losses
    "linear_cross_entropy": "losses.linear_cross_entropy",
    "linear_kl_divergence": "losses.linear_kl_divergence",
    "linear_log_probs": "losses",
    # quantization
    "quantize_model": "quantization",
    "plan_quantization": "quantization",
    "quantization_report": "quantization",
    "quantization_config": "quantization",
    "QuantizationPlan": "quantization",
    "QuantizationReport": "quantization",
    # wiring
    "wired_limit": "wiring",
    # all of it
    "autofit": "fitting.autofit",
    "Fit": "fitting.result",
    # environment
    "diagnose": "diagnosis",
    "explain": "diagnosis.explain",
    # errors
    "MlxTuneError": "errors",
    "InvalidArgumentError": "errors",
    "MissingDependencyError": "errors",
    "BackendError": "errors",
    "BudgetError": "errors",
    "DiskError": "errors",
    "CheckpointError": "errors",
    "TraceError": "errors",
    "TrialError": "errors",
    "QuantizationError": "errors",
}

__all__ = [*_HOMES, "__version__", "lm"]

if TYPE_CHECKING:
    from mlx_tune.batching import AutobatchResult as AutobatchResult
    from mlx_tune.batching import autobatch_by_length as autobatch_by_length
    from mlx_tune.batching.autobatch import autobatch as autobatch
    from mlx_tune.checkpointing import CheckpointPlan as CheckpointPlan
    from mlx_tune.checkpointing import checkpoint as checkpoint
    from mlx_tune.checkpointing import checkpoint_blocks as checkpoint_blocks
    from mlx_tune.checkpointing import is_checkpointed as is_checkpointed
    from mlx_tune.checkpointing import is_recomputing as is_recomputing
    from mlx_tune.checkpointing import is_tiled as is_tiled
    from mlx_tune.checkpointing import plan_checkpoints as plan_checkpoints
    from mlx_tune.checkpointing import tile_blocks as tile_blocks
    from mlx_tune.checkpointing import uncheckpoint as uncheckpoint
    from mlx_tune.checkpointing import untile as untile
    from mlx_tune.checkpointing import verify_checkpoint as verify_checkpoint
    from mlx_tune.checkpointing.block.keep import keep as keep
    from mlx_tune.checkpointing.tile import tile as tile
    from mlx_tune.diagnosis import diagnose as diagnose
    from mlx_tune.diagnosis.explain import explain as explain
    from mlx_tune.errors import BackendError as BackendError
    from mlx_tune.errors import BudgetError as BudgetError
    from mlx_tune.errors import CheckpointError as CheckpointError
    from mlx_tune.errors import DiskError as DiskError
    from mlx_tune.errors import InvalidArgumentError as InvalidArgumentError
    from mlx_tune.errors import MissingDependencyError as MissingDependencyError
    from mlx_tune.errors import MlxTuneError as MlxTuneError
    from mlx_tune.errors import QuantizationError as QuantizationError
    from mlx_tune.errors import TraceError as TraceError
    from mlx_tune.errors import TrialError as TrialError
    from mlx_tune.fitting.autofit import autofit as autofit
    from mlx_tune.fitting.result import Fit as Fit
    from mlx_tune.graphs import ArraySpec as ArraySpec
    from mlx_tune.graphs import MemoryEstimate as MemoryEstimate
    from mlx_tune.graphs import estimate_memory as estimate_memory
    from mlx_tune.graphs import is_tracing as is_tracing
    from mlx_tune.losses import linear_log_probs as linear_log_probs
    from mlx_tune.losses.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
    from mlx_tune.losses.linear_kl_divergence import linear_kl_divergence as linear_kl_divergence
    from mlx_tune.measuring.tightest_limit import TightestLimit as TightestLimit
    from mlx_tune.measuring.tightest_limit import tightest_limit as tightest_limit
    from mlx_tune.memory import MemoryBudget as MemoryBudget
    from mlx_tune.memory import memory_budget as memory_budget
    from mlx_tune.memory import memory_limit as memory_limit
    from mlx_tune.memory import track_memory as track_memory
    from mlx_tune.quantization import QuantizationPlan as QuantizationPlan
    from mlx_tune.quantization import QuantizationReport as QuantizationReport
    from mlx_tune.quantization import plan_quantization as plan_quantization
    from mlx_tune.quantization import quantization_config as quantization_config
    from mlx_tune.quantization import quantization_report as quantization_report
    from mlx_tune.quantization import quantize_model as quantize_model
    from mlx_tune.units import format_bytes as format_bytes
    from mlx_tune.units import parse_bytes as parse_bytes
    from mlx_tune.wiring import wired_limit as wired_limit


def __getattr__(name: str) -> Any:
    """Find a public name in its module, once."""
    if name == "lm":
        return importlib.import_module("mlx_tune.lm")
    if name not in _HOMES:
        raise AttributeError(f"module 'mlx_tune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mlx_tune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
