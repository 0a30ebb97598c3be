"""The bridge to mlx-lm, and the only room that imports it.

Tokens out of real text, models from and to folders that stock mlx-lm reads, and mlx-lm's own trainer and
generator driven with what the rest of the library measured.
"""

from mlx_tune.lm.loading import load
from mlx_tune.lm.saving import save_quantized
from mlx_tune.lm.tokens import read_texts, token_batches

__all__ = ["load", "read_texts", "save_quantized", "token_batches"]
