"""The best scales, biases and codes of affine quantization, found without data.

`mx.quantize` takes each group's scale from its largest and smallest weight, works the codes out with that scale,
and only then rounds scale and bias to the weight's dtype. Here every scale and bias is judged *as stored*, with
codes worked out against it. The error of a group as a function of (scale, bias) is full of local minima: a grid
that happens to lie well under the group's 64 weights beats its neighbours by a tenth. So many pairs are tried,
the best is refined by alternating least squares (codes given the pair, then the pair given the codes: Lloyd's
algorithm with evenly spaced levels), and the pairs around it are tried again. The pair that `mx.quantize` stores is the
pair to beat, so no group is ever worse.
"""

from __future__ import annotations

import functools
import math
import os

import mlx.core as mx

from mlx_tune.devices import backend, computes_on_cpu
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.modes import Effort
from mlx_tune.quantization.formats.packing import check_affine, dequantize_float32
from mlx_tune.quantization.formats.scale_search import Solver, plan_search

__all__ = ["Effort", "dequantize_float32", "group_errors", "quantize_affine"]

#: Groups worked on at once: on a CPU as many as its cache holds, on a GPU enough to fill it. On CUDA starting kernels
#: takes longer than running them: on an H200 a chunk of 65,536 groups took 14.3 ms, one of 262,144 groups 16.1 ms.
_GROUPS = {"cpu": 4096, "metal": 65_536, "cuda": 131_072}

#: Groups looked at to learn whether a weight lies on a grid already. Where there are hardly more, looking takes longer
#: than searching every group for one.
_PROBED_GROUPS = 512


def quantize_affine(
    weight: mx.array,
    bits: int,
    group_size: int = 64,
    *,
    effort: Effort = "fast",
    importance: mx.array | None = None,
    scale_dtype: mx.Dtype | None = None,
    groups_at_once: int | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize a weight with the least squared error that its format allows, in `mx.quantize`'s own format.

    Args:
        weight: `[..., rows, columns]` in float32, float16 or bfloat16; columns a multiple of the group size.
        bits: Bits of a code: 1, 2, 3, 4, 5, 6 or 8.
        group_size: Columns that share a scale and a bias: 32, 64 or 128.
        effort: "fast" tries some 60 pairs of scale and bias for each group, "best" about ten times as many.
        importance: The energy of each input, `[columns]` or, for a stack of experts, `[experts, columns]`: squared
            errors count in proportion to it. Uniform by default.
        scale_dtype: Of scales and biases; the weight's by default.
        groups_at_once: Groups that are searched together, which bounds the memory; by default as many as keep the
            device busy.

    Returns:
        Packed `uint32` codes `[..., rows, columns * bits / 32]`, and scales and biases
        `[..., rows, columns / group_size]` in their dtype. In no group is the (weighted) squared error of
        `dequantize_float32` on them above that of what `mx.quantize` returns.

    Raises:
        QuantizationError: A shape, bits, group size or dtype that the format does not have, or a weight or an
            importance that is not finite.

    Examples:
        >>> w = mx.random.normal((8, 128)).astype(mx.bfloat16)
        >>> packed, scales, biases = quantize_affine(w, 4, 64)
        >>> packed.shape, scales.shape, scales.dtype == mx.bfloat16
        ((8, 16), (8, 2), True)
    """
    check_affine(weight.shape, bits, group_size)
    if effort not in ("fast", "best"):
        raise QuantizationError(f"effort={effort!r}: there are 'fast' and 'best'.")
    if weight.dtype not in (mx.float32, mx.float16, mx.bfloat16):
        raise QuantizationError(
            f"A weight of dtype {weight.dtype} cannot be quantized: float32, float16, bfloat16 can."
        )
    *lead, rows, columns = weight.shape
    experts = math.prod(lead)
    stack = weight.reshape(experts, rows, columns)
    energies = _energies(importance, columns, tuple(lead))
    cpu = computes_on_cpu()
    groups = groups_at_once or _GROUPS["cpu" if cpu else backend()]
    per_chunk = max(1, groups // (columns // group_size))
    solve = Solver(bits, group_size, plan_search(bits, effort), scale_dtype or weight.dtype)
    streams = _streams() if cpu else [mx.default_stream(mx.default_device())]

    chunks = [(e, r) for e in range(experts) for r in range(0, rows, per_chunk)]
    finite: list[mx.array] = []
    few = weight.size <= 2 * _PROBED_GROUPS * group_size
    on_grid = effort == "best" or few or solve.lies_on_grid(_probe(stack, group_size))
    done: list[tuple[mx.array, mx.array, mx.array]] = []
    for i in range(0, len(chunks), len(streams)):
        batch = []
        for stream, (expert, row) in zip(streams, chunks[i : i + len(streams)], strict=False):
            with mx.stream(stream):
                part = stack[expert, row : row + per_chunk]
                energy = None if energies is None else energies[expert if energies.shape[0] > 1 else 0]
                finite.append(mx.isfinite(part).all())
                batch.append(solve(part, energy, on_grid))
        # One chunk for each core is in flight at a time, which bounds the memory.
        mx.async_eval(batch, finite[-len(batch) :])
        if done:
            mx.eval(done[-1])
        done += batch
    if not mx.stack(finite).all().item():
        raise QuantizationError(f"A weight of shape {list(weight.shape)} holds NaN or infinity: it has no scale.")
    packed, scales, biases = (mx.concatenate(list(parts)).reshape(*lead, rows, -1) for parts in zip(*done, strict=True))
    mx.eval(packed, scales, biases)
    return packed, scales, biases


def group_errors(
    weight: mx.array,
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    bits: int,
    group_size: int,
    importance: mx.array | None = None,
) -> mx.array:
    """The squared error of every group, worked out in float32.

    Args:
        weight: `[..., rows, columns]`.
        packed: Its codes.
        scales: Its scales.
        biases: Its biases.
        bits: Bits of a code.
        group_size: Columns that share a scale.
        importance: Weights of the squared errors, as for `quantize_affine`.

    Returns:
        float32 `[..., rows, columns / group_size]`.

    Examples:
        >>> w = mx.zeros((2, 64))
        >>> group_errors(w, *mx.quantize(w, bits=4), bits=4, group_size=64).tolist()
        [[0.0], [0.0]]
    """
    error = weight.astype(mx.float32) - dequantize_float32(packed, scales, biases, bits, group_size)
    squares = mx.square(error)
    if importance is not None:
        squares = squares * (importance if importance.ndim == 1 else importance[..., None, :])
    return squares.reshape(*weight.shape[:-1], -1, group_size).sum(-1)


def _energies(importance: mx.array | None, columns: int, lead: tuple[int, ...]) -> mx.array | None:
    """The importance as `[experts or 1, columns]`, scaled to a mean of 1, with no column quite ignored."""
    if importance is None:
        return None
    if importance.shape not in ((columns,), (*lead, columns)):
        raise QuantizationError(
            f"importance has shape {list(importance.shape)}: [{columns}], one for each column, is needed"
            + (f", or {[*lead, columns]}." if lead else ".")
        )
    energies = importance.astype(mx.float32).reshape(-1, columns)
    mean = energies.mean(-1, keepdims=True)
    if not (mx.isfinite(energies).all() & (energies >= 0).all()).item():
        raise QuantizationError("importance holds NaN, infinity or negative values: it is an energy for each column.")
    # An expert that got no tokens says nothing about its inputs.
    return mx.where(mean > 0, mx.maximum(energies / mx.maximum(mean, 1e-30), 1e-4), 1.0)


def _probe(stack: mx.array, group_size: int) -> mx.array:
    """Some groups of the weight, spread over it, as columns."""
    rows = stack.reshape(-1, stack.shape[-1])
    per_row = stack.shape[-1] // group_size
    step = max(1, rows.shape[0] * per_row // _PROBED_GROUPS)
    # Rows far apart, and of each another group, so that few rows are read of a weight that lies on disk.
    wanted = range(0, rows.shape[0] * per_row, step)
    row = mx.array([i // per_row for i in wanted][:_PROBED_GROUPS])
    group = mx.array([(i // per_row * 7 + i) % per_row for i in wanted][:_PROBED_GROUPS])
    return rows.reshape(-1, per_row, group_size)[row, group]


@functools.cache
def _streams() -> list[mx.Stream]:
    """One CPU stream for each core: a stream's elementwise work runs on one thread."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    return [mx.new_stream(mx.cpu) for _ in range(min(cores, 16))]
