"""The bridge to mlx-lm, and the only room that imports it.

Tokens out of real text, models from and to folders that stock mlx-lm reads, and mlx-lm's own trainer and
generator driven with what the rest of the library measured.
"""

from mlx_tune.lm.adapters import add_adapters, make_optimizer
from mlx_tune.lm.capacity.answer import fits
from mlx_tune.lm.capacity.result import Fits, GenerationFit, TrainingWay
from mlx_tune.lm.fitting import autobatch, autofit, estimate_memory, plan_checkpoints, verify_checkpoint
from mlx_tune.lm.generation import autobatch_generate
from mlx_tune.lm.generation_result import GenerationBatchResult, GenerationTrial
from mlx_tune.lm.lengths.longest_sequence import longest_sequence
from mlx_tune.lm.lengths.result import LongestSequence
from mlx_tune.lm.lengths.truncation import Truncation, truncation
from mlx_tune.lm.loading import load
from mlx_tune.lm.losses import loss
from mlx_tune.lm.quantizing.cache_report import CacheCost, CacheReport, cache_report
from mlx_tune.lm.quantizing.quantize_folder import quantize_folder
from mlx_tune.lm.saving import save_quantized
from mlx_tune.lm.steps import TrainingStep, training_step
from mlx_tune.lm.tokens import read_texts, token_batches
from mlx_tune.lm.training import train
from mlx_tune.lm.training_result import LossReport, TrainingResult

__all__ = [
    "CacheCost",
    "CacheReport",
    "Fits",
    "GenerationBatchResult",
    "GenerationFit",
    "GenerationTrial",
    "LongestSequence",
    "LossReport",
    "TrainingResult",
    "TrainingStep",
    "TrainingWay",
    "Truncation",
    "add_adapters",
    "autobatch",
    "autobatch_generate",
    "autofit",
    "cache_report",
    "estimate_memory",
    "fits",
    "load",
    "longest_sequence",
    "loss",
    "make_optimizer",
    "plan_checkpoints",
    "quantize_folder",
    "read_texts",
    "save_quantized",
    "token_batches",
    "train",
    "training_step",
    "truncation",
    "verify_checkpoint",
]
