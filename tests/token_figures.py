"""Figures of tokens in NumPy's float64, for references."""

import mlx.core as mx
import numpy as np


def reference_figures(x: np.ndarray, y: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """The same figures in NumPy and float64."""

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    lx, ly = log_softmax(x.astype(np.float64)), log_softmax(y.astype(np.float64))
    at = targets[..., None]
    return {
        "kl": (np.exp(lx) * (lx - ly)).sum(-1).reshape(-1),
        "reverse_kl": (np.exp(ly) * (ly - lx)).sum(-1).reshape(-1),
        "same_top": (x.argmax(-1) == y.argmax(-1)).reshape(-1),
        "nll_before": -np.take_along_axis(lx, at, -1).reshape(-1),
        "nll_after": -np.take_along_axis(ly, at, -1).reshape(-1),
        "confidence": np.exp(lx).max(-1).reshape(-1),
    }


def logits(seed: int, shape: tuple[int, ...] = (3, 7, 50)) -> mx.array:
    return 3 * mx.random.normal(shape, key=mx.random.key(seed))
