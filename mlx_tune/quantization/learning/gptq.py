"""Codes, scales and biases with the least error of a layer's *outputs*, from the second moments of its inputs.

GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323) goes through a weight's columns once and lets the
columns to come make up for each one's rounding. Here that is the start. Scales are searched on the updated
weights, each column counted with what an error in it costs once later columns have made up for it; groups with the
most energy go first. Then come sweeps of coordinate descent (QuantEase, Behdin et al., 2023,
https://arxiv.org/abs/2309.01885): every code anew with all others given, every scale and bias by least squares in
the full metric, accepted as stored and only where the error falls.

Arrays in, arrays out; `mlx_tune.quantization.learning.gptq_model` runs it on models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_tune.devices import computes_on_cpu
from mlx_tune.errors import QuantizationError
from mlx_tune.measuring.float32_products import matmul_float32
from mlx_tune.quantization.formats.affine import quantize_affine
from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.formats.packing import check_affine, dequantize_float32, pack
from mlx_tune.quantization.formats.scale_search import Solver, can_compile, inverse_of, plan_search, to_codes
from mlx_tune.quantization.learning.curvature import Curvature
from mlx_tune.units import number

#: Sweeps of coordinate descent by effort.
_SWEEPS = {"fast": 4, "best": 12}

#: Columns that hear of each other's moves one by one: others hear of theirs in one product.
_TOGETHER = 16


class GptqResult(NamedTuple):
    """A quantized weight and the error of its outputs.

    Attributes:
        packed: `uint32` codes in MLX's format.
        scales: In the weight's dtype.
        biases: As `scales`.
        error: Squared output error over squared output, on the moments that it was solved for.
        optimal_error: The same for `quantize_affine`, which knows no inputs.
    """

    packed: mx.array
    scales: mx.array
    biases: mx.array
    error: float
    optimal_error: float


def quantize_gptq(
    weight: mx.array,
    hessian: mx.array,
    bits: int,
    group_size: int = 64,
    *,
    effort: Effort = "fast",
    start: tuple[mx.array, mx.array, mx.array] | None = None,
    shrinkage: float = 0.0,
    curvature: Curvature | None = None,
) -> GptqResult:
    """Quantize one weight so that the error of its outputs is least.

    Args:
        weight: `[rows, columns]` in float32, float16 or bfloat16. With `start`, scales get the dtype of those instead
            of the weight's.
        hessian: Second moments of the layer's inputs, `x.T @ x` summed or averaged over tokens, `[columns, columns]`.
        bits: Bits of a code: 1, 2, 3, 4, 5, 6 or 8.
        group_size: Columns that share a scale and a bias: 32, 64 or 128.
        effort: The extent of the search for scales, and of the passes over codes.
        start: The result of `quantize_affine` for this weight, if it is at hand.
        shrinkage: Share by which moments between different inputs are scaled down, from 0 to 1: what few tokens say
            of them is mostly chance. `shrinkage_for` gives one.
        curvature: That of this Hessian, group size and shrinkage, if it is at hand: layers that are given the same
            inputs share it.

    Returns:
        Arrays in `mx.quantize`'s format, row by row never with more output error than `quantize_affine`, and both
        relative errors.

    Raises:
        QuantizationError: A feature that the format lacks, a Hessian of another shape, or one that is not finite.

    Examples:
        >>> x = mx.random.normal((256, 64)) @ mx.random.normal((64, 64))
        >>> result = quantize_gptq(mx.random.normal((8, 64)), x.T @ x, 4, 64)
        >>> result.error < result.optimal_error
        True
    """
    check_affine(weight.shape, bits, group_size)
    columns = weight.shape[-1]
    if weight.ndim != 2 or hessian.shape != (columns, columns):
        raise QuantizationError(
            f"A weight of shape {list(weight.shape)} and a Hessian of shape {list(hessian.shape)}: "
            f"[rows, columns] and [columns, columns] are needed; pass stacked experts one by one."
        )
    h = hessian.astype(mx.float32)
    if not mx.isfinite(h).all().item():
        raise QuantizationError("The Hessian holds NaN or infinity: an input of the layer was not finite.")
    optimal = start if start is not None else quantize_affine(weight, bits, group_size, effort=effort)
    w = weight.astype(mx.float32)
    plain = dequantize_float32(*optimal, bits, group_size)
    energy = _row_errors(w, h).sum()
    before = _row_errors(w - plain, h)
    if not number(energy) > 0:
        return GptqResult(*optimal, 0.0, 0.0)

    if curvature is None:
        curvature = Curvature(h, group_size, shrinkage)
    order, groups = curvature.order, curvature.groups
    dtype = optimal[1].dtype
    job = _Job(bits, group_size, dtype, effort)
    codes, scales, biases = job.first_pass(w[:, order], curvature.feedback)
    codes, scales, biases = job.sweep(w[:, order], curvature.damped, codes, scales, biases, _SWEEPS[effort])

    back = mx.argsort(order)
    codes = codes[:, back]
    scales, biases = (x[:, mx.argsort(groups)].astype(dtype) for x in (scales, biases))
    found = (pack(codes, bits), scales, biases)
    after = _row_errors(w - dequantize_float32(*found, bits, group_size), h)
    better = (after < before)[:, None]
    packed, scales, biases = (mx.where(better, new, old) for new, old in zip(found, optimal, strict=True))
    error = mx.minimum(after, before).sum() / energy
    mx.eval(packed, scales, biases, error)
    return GptqResult(packed, scales, biases, number(error), number(before.sum() / energy))


def shrinkage_for(columns: int, tokens: int) -> float:
    """The trust in moments between inputs that were estimated from so many tokens.

    Sampling noise grows with the inputs and falls with the tokens. The factor is measured: on 16,384 tokens of code,
    output errors on other text were least at a share of 0.2 for 512 inputs and of 0.7 for 1408.

    Args:
        columns: The layer's inputs.
        tokens: Tokens that the moments were summed over.

    Examples:
        >>> shrinkage_for(512, 131072), shrinkage_for(4096, 1024)
        (0.03125, 0.7)
    """
    return min(0.7, max(0.02, 8 * columns / max(1, tokens)))


def output_error(weight: mx.array, approximation: mx.array, hessian: mx.array) -> float:
    """Squared error of a layer's outputs over their squares, from the second moments of its inputs.

    Args:
        weight: `[rows, columns]`.
        approximation: The stand-in for it, of the same shape.
        hessian: `[columns, columns]`.

    Returns:
        The ratio; 0 where the outputs are 0.

    Examples:
        >>> w = mx.ones((2, 32))
        >>> round(output_error(w, 1.1 * w, mx.eye(32)), 4)
        0.01
    """
    w, h = weight.astype(mx.float32), hessian.astype(mx.float32)
    energy = number(_row_errors(w, h).sum())
    error = number(_row_errors(w - approximation.astype(mx.float32), h).sum())
    return max(0.0, error / energy) if energy > 0 else 0.0


def _row_errors(error: mx.array, h: mx.array) -> mx.array:
    """`e H e^T` for every row e."""
    return (matmul_float32(error, h) * error).sum(-1)


class _Job:
    """The passes over one weight whose columns are in processing order; groups in columns of scales and biases."""

    def __init__(self, bits: int, group_size: int, dtype: mx.Dtype, effort: Effort) -> None:
        self._size = group_size
        self._top = mx.array(float(2**bits - 1))
        self._solver = Solver(bits, group_size, plan_search(bits, effort), dtype)
        self._kernels = _kernels(computes_on_cpu(), can_compile(mx.default_device().type), dtype)

    def first_pass(self, w: mx.array, feedback: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """GPTQ: group by group, columns in order, later columns make up."""
        size, columns = self._size, w.shape[1]
        cost = 1 / mx.square(mx.diag(feedback))
        codes, scales, biases = [], [], []
        w = w.T
        for i in range(0, columns, size):
            j = i + size
            part, w = w[:size], w[size:]
            scale, bias = self._solver.pairs(part.T, cost[i:j] / cost[i:j].mean())
            inner = feedback[i:j, i:j]
            q, errors = self._in_turn(part, inner.T, scale, bias, _cells(1 / mx.diag(inner)))
            if j < columns:
                w = w + matmul_float32(feedback[i:j, j:].T, errors)
            codes.append(q.T)
            scales.append(scale.T)
            biases.append(bias.T)
            mx.eval(w, codes[-1], scales[-1], biases[-1])
        return (mx.concatenate(parts, axis=1) for parts in (codes, scales, biases))  # type: ignore[return-value]

    def sweep(
        self, w: mx.array, h: mx.array, codes: mx.array, scales: mx.array, biases: mx.array, sweeps: int
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Coordinate descent: each group's pair by least squares, then each of its codes, all others given."""
        size = self._size
        spread = functools.partial(mx.repeat, repeats=size, axis=1)
        groups = w.shape[1] // size
        # Everything in pieces of one group, [size, rows], so that a sweep touches no more than it changes.
        q = [codes[:, k * size : (k + 1) * size].T for k in range(groups)]
        pairs = [(scales[:, k : k + 1].T, biases[:, k : k + 1].T) for k in range(groups)]
        error = (w - (codes * spread(scales) + spread(biases))).T
        pull = matmul_float32(h, error)
        for _ in range(sweeps):
            for k in range(groups):
                part = slice(k * size, (k + 1) * size)
                q[k], pairs[k], change = self._descend(q[k], *pairs[k], pull[part], h[part, part])
                pull = pull + matmul_float32(h[part].T, change)
                mx.eval(q[k], pairs[k], pull)
        return (
            mx.concatenate(q).T,
            mx.concatenate([s for s, _ in pairs]).T,
            mx.concatenate([b for _, b in pairs]).T,
        )

    def _descend(
        self, q: mx.array, scale: mx.array, bias: mx.array, pull: mx.array, inner: mx.array
    ) -> tuple[mx.array, tuple[mx.array, mx.array], mx.array]:
        """One group of a sweep: its pair, then its codes; gives back how the error changed, too."""
        # The pair: two unknowns for each row, in the metric of the whole layer, judged as they will be stored.
        ones_inner = inner.sum(0, keepdims=True)
        q_inner = matmul_float32(inner, q)
        a, b, c = (q_inner * q).sum(0, keepdims=True), matmul_float32(ones_inner, q), ones_inner.sum()
        u, v = (pull * q).sum(0, keepdims=True), pull.sum(0, keepdims=True)
        ds, db = self._kernels.pair(a, b, c, u, v, scale, bias)
        scale, bias = scale + ds, bias + db
        change = -(ds * q + db)
        pull = pull + matmul_float32(inner, change)
        # The codes, each where the pull of all the others leaves it.
        codes: Any = mx.split(q, self._size)
        new, moves = self._in_turn(pull, inner, scale, bias, _cells(1 / mx.diag(inner)), codes)
        return new, (scale, bias), change + moves

    def _in_turn(
        self,
        values: mx.array,
        links: mx.array,
        scale: mx.array,
        bias: mx.array,
        shares: list[mx.array],
        codes: list[mx.array] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Round the columns of a group one after the other; each makes up for those before it.

        Args:
            values: Of each column, `[size, rows]`: its weights or, where codes are given, the pull on them.
            links: Of the columns, `[size, size]`: what a move of k does to the value of j at `[j, k]`.
            scale: `[1, rows]`.
            bias: `[1, rows]`.
            shares: Factors of each column's value or error, `[1, 1]` each.
            codes: The codes to improve on, `[1, rows]` each.

        Returns:
            The codes, and each column's move, `[size, rows]`.
        """
        kernels, size, inverse = self._kernels, self._size, inverse_of(scale)
        found, moves = [], []
        for start in range(0, size, _TOGETHER):
            # Only the next few columns are told of each move; those behind them hear of all of these at once.
            near, values = values[:_TOGETHER], values[_TOGETHER:]
            count, these = near.shape[0], []
            for k in range(start, start + count):
                if codes is None:
                    code, move = kernels.rounded(near[:1], scale, bias, inverse, shares[k], self._top)
                else:
                    code, move = kernels.improved(near[:1], scale, bias, inverse, shares[k], self._top, codes[k])
                found.append(code)
                these.append(move)
                if k + 1 < start + count:
                    near = kernels.told(near[1:], links[k + 1 : start + count, k : k + 1], move)
            moves.append(mx.concatenate(these))
            if values.shape[0]:
                behind = links[start + count :, start : start + count]
                values = values + matmul_float32(behind, moves[-1])
        return mx.concatenate(found), mx.concatenate(moves)


def _cells(row: mx.array) -> list[mx.array]:
    """The numbers of `[n]`, `[1, 1]` each."""
    cells: Any = mx.split(row[:, None], row.size)
    return list(cells)


class _Kernels(NamedTuple):
    """The elementwise work of the passes, each function one fused kernel where MLX can compile."""

    rounded: Callable[..., list[mx.array]]
    improved: Callable[..., list[mx.array]]
    told: Callable[..., mx.array]
    pair: Callable[..., list[mx.array]]


@functools.cache
def _kernels(cpu: bool, compiled: bool, dtype: mx.Dtype) -> _Kernels:
    """Make them. Everything that varies is an argument, since each constant would mean another kernel."""

    def rounded(
        value: mx.array, scale: mx.array, bias: mx.array, inverse: mx.array, share: mx.array, top: mx.array
    ) -> list[mx.array]:
        code = to_codes(value, inverse, bias, top, cpu=cpu)
        return [code, (code * scale + bias - value) * share]

    def improved(
        pull: mx.array,
        scale: mx.array,
        bias: mx.array,
        inverse: mx.array,
        share: mx.array,
        top: mx.array,
        code: mx.array,
    ) -> list[mx.array]:
        new = to_codes(code * scale + bias + pull * share, inverse, bias, top, cpu=cpu)
        return [new, (code - new) * scale]

    def told(values: mx.array, links: mx.array, move: mx.array) -> mx.array:
        return values + links * move

    def pair(
        a: mx.array, b: mx.array, c: mx.array, u: mx.array, v: mx.array, scale: mx.array, bias: mx.array
    ) -> list[mx.array]:
        determinant = a * c - b * b
        usable = determinant > 1e-6 * a * c
        divisor = mx.where(usable, determinant, 1.0)
        ds = mx.where(usable, (c * u - b * v) / divisor, 0.0)
        db = mx.where(usable, (a * v - b * u) / divisor, 0.0)
        ds = (scale + ds).astype(dtype).astype(mx.float32) - scale
        db = (bias + db).astype(dtype).astype(mx.float32) - bias
        gain = 2 * (ds * u + db * v) - (ds * ds * a + 2 * ds * db * b + db * db * c)
        return [mx.where(gain > 0, ds, 0.0), mx.where(gain > 0, db, 0.0)]

    every: tuple[Any, ...] = (rounded, improved, told, pair)
    return _Kernels(*(mx.compile(kernel) if compiled else kernel for kernel in every))
