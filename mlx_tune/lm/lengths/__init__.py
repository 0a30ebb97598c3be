"""Lengths of rows: those that a data set has, and those that fit."""

from mlx_tune.lm.lengths.truncation import Truncation, truncation

__all__ = ["Truncation", "truncation"]
