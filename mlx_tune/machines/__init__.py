"""Machines that one may ask about without having them: their memory, and the part of it that MLX may use."""
