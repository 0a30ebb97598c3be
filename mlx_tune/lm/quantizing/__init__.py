"""Quantized models as folders that mlx-lm reads, made a piece at a time."""
