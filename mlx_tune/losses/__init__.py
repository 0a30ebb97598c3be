"""Losses of models with large vocabularies, which never hold the logits of more than a few tokens."""

from __future__ import annotations

from mlx_tune.losses.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from mlx_tune.losses.linear_kl_divergence import linear_kl_divergence

__all__ = ["linear_cross_entropy", "linear_kl_divergence", "linear_log_probs"]
