"""Making up, in one layer, for what quantizing the layers before it did to its inputs.

By the time that a layer is quantized, its inputs come from quantized layers and have moved away from what they were.
The output should stay *on the inputs as they were*: `W x` for the unquantized model's x, out of the x that
there is now. The weight that does so best is a least-squares solution, and it takes the place of W as what is to be
quantized (Arai and Ichikawa, Quantization Error Propagation, 2025, https://arxiv.org/abs/2504.09629; Li et al., GPTAQ,
2025, https://arxiv.org/abs/2504.02692).
"""

from __future__ import annotations

import mlx.core as mx

from mlx_tune.measuring.float32_products import matmul_float32
from mlx_tune.quantization.learning.moments import Drift
from mlx_tune.units import number

#: How much of the way to the least-squares solution is gone. All of it is too much: what a layer cannot see of its
#: inputs' drift, later layers and the residual stream can make up for as well.
_SHARE = 0.5

#: What is added to the moments' diagonal, as a share of its mean.
_DAMPING = 0.01


def corrected(weight: mx.array, moments: mx.array, drift: Drift, shrinkage: float = 0.0) -> mx.array:
    """The weight that is to be quantized instead, so that outputs stay closer to what they were.

    Args:
        weight: `[rows, columns]`.
        moments: Second moments of the inputs as they are now, `[columns, columns]`.
        drift: The drift.
        shrinkage: As for `quantize_gptq`: how little to trust moments between different inputs.

    Returns:
        float32 `[rows, columns]`.

    Examples:
        >>> before = mx.random.normal((200, 32))
        >>> now = 0.8 * before
        >>> d = before - now
        >>> w = mx.random.normal((4, 32))
        >>> better = corrected(w, now.T @ now, Drift(d.T @ now))
        >>> (mx.square(now @ better.T - before @ w.T).sum() < mx.square(now @ w.T - before @ w.T).sum()).item()
        True
    """
    w, h = weight.astype(mx.float32), moments.astype(mx.float32)
    diagonal = mx.diag(h)
    damped = (1 - shrinkage) * h + mx.diag(shrinkage * diagonal + _DAMPING * diagonal.mean() + 1e-30)
    # MLX solves on the CPU only.
    step = mx.linalg.solve(damped, matmul_float32(w, drift.cross).T, stream=mx.cpu).T
    moved = w + _SHARE * step
    return moved if mx.isfinite(moved).all().item() else w


def drifted_output_error(weight: mx.array, approximation: mx.array, moments: mx.array, drift: Drift) -> float:
    """Squared error of outputs on the inputs as they are now, against those on the inputs as they were.

    Args:
        weight: `[rows, columns]`.
        approximation: The stand-in for it.
        moments: Second moments of the inputs now.
        drift: With its `own`.

    Returns:
        The error over the squares of the outputs as they were; 0 where those are 0.

    Examples:
        >>> w, x = mx.ones((1, 32)), mx.ones((5, 32))
        >>> round(drifted_output_error(w, w, (0.9 * x).T @ (0.9 * x), Drift(0.09 * x.T @ x, 0.01 * x.T @ x)), 4)
        0.01
    """
    assert drift.own is not None
    w, h = weight.astype(mx.float32), moments.astype(mx.float32)
    e = w - approximation.astype(mx.float32)
    # W (x + d) - V x = W d + (W - V) x
    error = (matmul_float32(w, drift.own) * w).sum() + (matmul_float32(e, h) * e).sum()
    error = error + 2 * (matmul_float32(w, drift.cross) * e).sum()
    before = h + drift.cross + drift.cross.T + drift.own
    energy = number((matmul_float32(w, before) * w).sum())
    return max(0.0, number(error) / energy) if energy > 0 else 0.0
