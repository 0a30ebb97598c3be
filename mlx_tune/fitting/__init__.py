"""Checkpoints, batch size, accumulation and memory limit, chosen together."""

from mlx_tune.fitting.autofit import autofit
from mlx_tune.fitting.result import Fit, Setting

__all__ = ["Fit", "Setting", "autofit"]
