"""Second moments of a layer's inputs, made ready for quantizing: damped, put in order, and inverted."""

from __future__ import annotations

import mlx.core as mx

from mlx_tune.devices import computes_on_cpu
from mlx_tune.errors import QuantizationError
from mlx_tune.measuring.float32_products import matmul_float32

#: What is added to the diagonal, as a share of its mean: inputs seen in calibration are not all there are.
DAMPING = 0.01

#: MLX factorises on the processor only. Where there is a GPU, matrices of more rows are taken in halves, so that nearly
#: all of the work is products, which the GPU does.
_AT_ONCE = 256


class Curvature:
    """The Hessian of a layer's inputs made ready for quantizing: damped, in the order of the work, and inverted.

    Args:
        hessian: Second moments of the inputs, `[columns, columns]`.
        group_size: Columns that share a scale.
        shrinkage: As for `quantize_gptq`.

    Attributes:
        order: The columns by falling energy, those of a group together, `[columns]`.
        groups: The groups in that order, `[groups]`.
        damped: The Hessian in that order, shrunk and damped.
        feedback: Upper `U` with `U.T @ U = inverse(damped)`: row j says how later columns make up for an error in
            column j.

    Raises:
        QuantizationError: It cannot be factorised.

    Examples:
        >>> x = mx.random.normal((256, 64))
        >>> curvature = Curvature(x.T @ x, 32)
        >>> y = mx.random.normal((64, 3))
        >>> mx.allclose(x.T @ (x @ curvature.solve(y)), y, atol=0.1).item()
        True
    """

    def __init__(self, hessian: mx.array, group_size: int, shrinkage: float = 0.0) -> None:
        """Factorise it."""
        h = hessian.astype(mx.float32)
        diagonal = mx.diag(h)
        self._shrinkage = shrinkage
        self.order, self.groups = _order(diagonal, group_size)
        damped = self.shrunk(h) + (DAMPING * diagonal.mean() + 1e-30) * mx.eye(diagonal.size)
        self.damped = damped[self.order].T[self.order]  # it is symmetric, and rows are quick to gather
        self.feedback = _feedback(self.damped)

    def shrunk(self, moments: mx.array) -> mx.array:
        """Moments of the same tokens with those between different columns scaled down as here.

        Args:
            moments: `[columns, columns]`.
        """
        return (1 - self._shrinkage) * moments + self._shrinkage * mx.diag(mx.diag(moments))

    def solve(self, right: mx.array) -> mx.array:
        """The damped Hessian's inverse times a matrix `[columns, n]`, both with columns as the layer has them."""
        ordered = matmul_float32(self.feedback.T, matmul_float32(self.feedback, right[self.order]))
        return ordered[mx.argsort(self.order)]


def _order(diagonal: mx.array, group_size: int) -> tuple[mx.array, mx.array]:
    """Columns and groups by falling energy, groups kept together: what costs most is rounded while all can help."""
    parts = diagonal.reshape(-1, group_size)
    groups = mx.argsort(-parts.sum(-1))
    inside = mx.argsort(-parts, axis=-1)
    order = (inside + group_size * mx.arange(parts.shape[0])[:, None])[groups].reshape(-1)
    return order, groups


def _feedback(damped: mx.array) -> mx.array:
    """Upper U with `U.T @ U = inverse(damped)`."""
    boost = mx.eye(damped.shape[0]) * mx.diag(damped).mean()
    at_once = damped.shape[0] if computes_on_cpu() else _AT_ONCE
    for extra in (0.0, 0.1, 1.0):
        # With rows and columns reversed, one factor and one triangular inverse do.
        upper = _inverse_factor((damped + extra * boost if extra else damped)[::-1, ::-1], at_once)[::-1, ::-1]
        if (mx.isfinite(upper).all() & (mx.diag(upper) > 0).all()).item():
            return upper
    raise QuantizationError("The Hessian cannot be factorised, even with its diagonal doubled: are inputs finite?")


def _inverse_factor(matrix: mx.array, at_once: int) -> mx.array:
    """The inverse of a positive definite matrix's Cholesky factor: lower X with `X @ matrix @ X.T` the identity."""
    rows = matrix.shape[0]
    if rows <= at_once:
        return mx.linalg.tri_inv(mx.linalg.cholesky(matrix, stream=mx.cpu), upper=False, stream=mx.cpu)
    half = -(-rows // 2)
    first = _inverse_factor(matrix[:half, :half], at_once)
    below = matmul_float32(matrix[half:, :half], first.T)  # the factor's lower left part
    second = _inverse_factor(matrix[half:, half:] - matmul_float32(below, below.T), at_once)
    corner = -matmul_float32(second, matmul_float32(below, first))
    top = mx.concatenate([first, mx.zeros((half, rows - half))], axis=1)
    return mx.concatenate([top, mx.concatenate([corner, second], axis=1)])
