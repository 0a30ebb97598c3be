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
from mlx_tune.quantization.learning.curvature import Curvature
from mlx_tune.quantization.learning.moments import Drift
from mlx_tune.units import number

#: How much of the way to the least-squares solution is gone. All of it is too much: what a layer cannot see of its
#: inputs' drift, later layers and the residual stream can make up for as well.
_SHARE = 0.75


def corrected(
    weight: mx.array,
    curvature: Curvature,
    drift: Drift,
    others: mx.array | None = None,
    drift_of_others: Drift | None = None,
) -> mx.array:
    """The weight that is to be quantized instead, so that outputs stay closer to what they were.

    The drift is shrunk as the moments are: solving for the one as it is by the other shrunk goes many times too far
    along what inputs have in common.

    Args:
        weight: `[rows, columns]`.
        curvature: That of the inputs as they are now, damped and shrunk.
        drift: The drift.
        others: Second moments of inputs that neither was learned from: no more of the way is gone than helps there.
        drift_of_others: The drift of those.

    Returns:
        float32 `[rows, columns]`.

    Examples:
        >>> before = mx.random.normal((200, 32))
        >>> now = 0.8 * before
        >>> d = before - now
        >>> w = mx.random.normal((4, 32))
        >>> better = corrected(w, Curvature(now.T @ now, 32), Drift(d.T @ now))
        >>> (mx.square(now @ better.T - before @ w.T).sum() < mx.square(now @ w.T - before @ w.T).sum()).item()
        True
    """
    w = weight.astype(mx.float32)
    step = curvature.solve(matmul_float32(w, curvature.shrunk(drift.cross)).T).T
    share = _SHARE
    if others is not None and drift_of_others is not None:
        share *= _useful_part(w, step, others, drift_of_others)
    moved = w + share * step
    return moved if mx.isfinite(moved).all().item() else w


def _useful_part(w: mx.array, step: mx.array, moments: mx.array, drift: Drift) -> float:
    """The part of a step, from 0 to 1, with which outputs come closest to what they were."""
    wanted = number((matmul_float32(w, drift.cross) * step).sum())
    size = number((matmul_float32(step, moments.astype(mx.float32)) * step).sum())
    return min(1.0, max(0.0, wanted / size)) if size > 0 else 0.0


class OutputErrors:
    """Squared errors of outputs on the inputs as they are now, against those on the inputs as they were.

    What does not depend on the stand-in is worked out once.

    Args:
        weight: `[rows, columns]`.
        moments: Second moments of the inputs now.
        drift: With its `own`; without, inputs are as they were.

    Examples:
        >>> w, x = mx.ones((1, 32)), mx.ones((5, 32))
        >>> drift = Drift(0.09 * x.T @ x, 0.01 * x.T @ x)
        >>> round(OutputErrors(w, (0.9 * x).T @ (0.9 * x), drift).of(w), 4)
        0.01
    """

    def __init__(self, weight: mx.array, moments: mx.array, drift: Drift | None = None) -> None:
        """Work out the squares of the outputs as they were."""
        self._weight, self._moments = weight.astype(mx.float32), moments.astype(mx.float32)
        squares = matmul_float32(self._weight, self._moments)
        self._own, self._cross = mx.array(0.0), None
        if drift is not None and drift.own is not None:
            self._cross = matmul_float32(self._weight, drift.cross)
            own = matmul_float32(self._weight, drift.own)
            self._own = (own * self._weight).sum()
            squares = squares + 2 * self._cross + own
        self.energy = number((squares * self._weight).sum())

    def of(self, approximation: mx.array) -> float:
        """The error of a stand-in over the squares of the outputs as they were; 0 where those are 0."""
        if self.energy <= 0:
            return 0.0
        e = self._weight - approximation.astype(mx.float32)
        # W (x + d) - V x = W d + (W - V) x
        through = matmul_float32(e, self._moments)
        if self._cross is not None:
            through = through + 2 * self._cross
        return max(0.0, number(self._own + (through * e).sum()) / self.energy)
