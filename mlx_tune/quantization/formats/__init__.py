"""Packed weights as arrays: MLX's formats, and the search for the numbers that they hold."""
