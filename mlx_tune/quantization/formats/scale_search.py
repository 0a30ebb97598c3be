"""The search for a group's best scale and bias: many starts, alternating least squares, and the neighbourhood.

Groups lie in columns, `[group size, groups]`, so that a pair for each group broadcasts along rows and every pass
over the weights is one fused, vectorised kernel. Each is divided by a power of two of its own size, so that squares of
very large and very small weights stay within float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_tune.devices import computes_on_cpu
from mlx_tune.quantization.formats.packing import pack, quantize_nearest
from mlx_tune.quantization.formats.powers_of_two import unit_of

#: No product of code and scale, and no weight unpacked, may pass this.
_MOST = float(mx.finfo(mx.float32).max)

#: Adding and subtracting 1.5 * 2**23 rounds a float32 to the nearest whole number, and compilers vectorise it.
_ROUNDER = 12582912.0


#: Weights of so many bytes are searched a few pairs at a time on a GPU. For fewer, waiting matters and memory does not.
_PACED_BYTES = 4 << 20


class SearchExtent(NamedTuple):
    """The extent of the search for a group.

    Attributes:
        low: The smallest scale tried, as a share of the one that just covers the group.
        high: The largest.
        scales: The number between them.
        offsets: The number of biases for each scale, spread over one step of the grid.
        kept: The number of these pairs, the best ones, that are refined: the best start often does not lead to the best
            end.
        rounds: Rounds of alternating least squares.
        near_scales: Steps to each side, in 2**-7.5 of the scale, tried around the best.
        near_offsets: Biases for each of those.
        passes: The number of times that trying around the best and refining is repeated.
    """

    low: float
    high: float
    scales: int
    offsets: int
    kept: int
    rounds: int
    near_scales: int
    near_offsets: int
    passes: int


#: The useful scales by bits: with few levels it pays to clip, with many only luck in placing the grid helps.
_SPANS = {
    1: (0.15, 0.7),
    2: (0.4, 1.0),
    3: (0.6, 1.0),
    4: (0.75, 1.0),
    5: (0.86, 1.01),
    6: (0.94, 1.03),
    8: (0.98, 1.03),
}


def plan_search(bits: int, effort: str) -> SearchExtent:
    low, high = _SPANS[bits]
    if effort == "best":
        return SearchExtent(low, high, 24, 8, 4, 4, 4, 8, 3)
    if bits <= 4:
        return SearchExtent(low, high, 8, 5, 4, 2, 0, 0, 0)
    # With many levels the landscape is so rugged that least squares ends close to where it starts.
    return SearchExtent(low, high, 8, 5, 2, 2, 1, 5, 1)


class _Best:
    """The best pairs of each group so far, the very best first: for each rank error, scale and bias, `[1, groups]`.

    All of them are in the groups' units, as are their smallest and largest weights.
    """

    def __init__(self, unit: mx.array, low: mx.array, high: mx.array, kept: int) -> None:
        self.unit, self.low, self.high = unit, low, high
        self.ranked = [mx.full(unit.shape, float("inf")), mx.zeros_like(unit), mx.zeros_like(unit)] * kept

    error = property(lambda self: self.ranked[0])
    scale = property(lambda self: self.ranked[1])
    bias = property(lambda self: self.ranked[2])

    def pairs(self) -> list[tuple[mx.array, mx.array]]:
        return [(self.ranked[i + 1], self.ranked[i + 2]) for i in range(0, len(self.ranked), 3)]

    def only_the_first(self) -> None:
        del self.ranked[3:]


class Solver:
    """Finds scales and biases for chunks of groups, which lie in columns so that a pair broadcasts along rows."""

    def __init__(self, bits: int, group_size: int, search: SearchExtent, dtype: mx.Dtype) -> None:
        self._bits, self._size, self._search, self._dtype = bits, group_size, search, dtype
        self._top = mx.array(float(2**bits - 1))
        self._cpu, self._ahead = computes_on_cpu(), mx.array(0.0)
        self._kernels = _kernels(self._cpu, can_compile(mx.default_device().type), dtype)

    def __call__(self, part: mx.array, energy: mx.array | None, on_grid: bool) -> tuple[mx.array, mx.array, mx.array]:
        """Solve rows `[rows, columns]` with the inputs' energy `[columns]`."""
        rows, columns = part.shape
        groups = part.reshape(-1, self._size)
        weights = None
        if energy is not None:
            weights = mx.tile(energy.reshape(-1, self._size).T, (1, rows))
        best, g = self._solve(groups.astype(self._dtype), weights, on_grid, groups)
        scale, bias, inverse = self._stored(best, best.scale, best.bias)
        codes = self._kernels.codes(g, inverse, bias, self._top)
        packed = pack(codes.T.reshape(rows, columns), self._bits)
        scales, biases = ((x * best.unit).reshape(rows, -1).astype(self._dtype) for x in (scale, bias))
        return packed, scales, biases

    def pairs(self, groups: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        """The best scale and bias of each group, as stored, in float32.

        Args:
            groups: `[groups, group size]` float32.
            weights: The weight of a squared error in each place, `[group size]`.

        Returns:
            Two arrays `[1, groups]`.
        """
        best, _ = self._solve(
            groups.astype(self._dtype), mx.tile(weights[:, None], (1, groups.shape[0])), False, groups
        )
        scale, bias, _ = self._stored(best, best.scale, best.bias)
        return scale * best.unit, bias * best.unit

    def lies_on_grid(self, probe: mx.array) -> bool:
        """True where some of these groups are a grid already, which the plain search does not find."""
        stored = probe.astype(self._dtype)
        plain, _ = self._solve(stored, None, False, probe)
        grid, g = self._solve(stored, None, True, probe)
        energy = mx.square(g - g.mean(0, keepdims=True)).sum(0, keepdims=True)
        found = (grid.error < 0.25 * plain.error) & (plain.error > 1e-9 * energy)
        return bool(found.any().item())

    def _solve(
        self, groups: mx.array, weights: mx.array | None, on_grid: bool, exact: mx.array
    ) -> tuple[_Best, mx.array]:
        search, top = self._search, self._top
        g = mx.contiguous(exact.astype(mx.float32).T)
        unit = unit_of(mx.abs(g).max(0, keepdims=True))
        g = g / unit
        high, low = g.max(0, keepdims=True), g.min(0, keepdims=True)
        best = _Best(unit, low, high, search.kept)
        _, scale, bias = quantize_nearest(groups, self._size, self._bits)
        assert bias is not None
        scale, bias = (x.astype(mx.float32).reshape(1, -1) / unit for x in (scale, bias))
        self._consider(best, g, weights, scale, bias)
        centre, cover = (high + low) / 2, (high - low) / top
        widest = 0.99 * _MOST / unit / top
        offsets = _spread(-0.5, 0.5, search.offsets)
        for share in _spread(search.low, search.high, search.scales):
            self._try_around(best, g, weights, mx.minimum(cover * share, widest), centre, offsets)
            self._pace(best, g)
        starts = best.pairs()
        best.only_the_first()
        for scale, bias in starts:
            self._consider(best, g, weights, *self._refine(g, weights, scale, bias, search.rounds))
            self._pace(best, g)
        if on_grid:
            for scale, bias in _grids(g, low, high, self._bits, self._dtype):
                self._consider(best, g, weights, scale, bias)
                self._consider(best, g, weights, *self._refine(g, weights, scale, bias, 1))
                self._pace(best, g)
        near = _spread(-0.5, 0.5, search.near_offsets)
        for k in range(search.passes):
            scale, centre = best.scale, best.bias + best.scale * top / 2
            for step in range(-search.near_scales, search.near_scales + 1):
                self._try_around(best, g, weights, scale * (1 + step * 2**-7.5), centre, near)
                self._pace(best, g)
            if k + 1 < search.passes:
                self._consider(best, g, weights, *self._refine(g, weights, best.scale, best.bias, search.rounds))
        return best, g

    def _pace(self, best: _Best, g: mx.array) -> None:
        """Let the device finish what was asked for before the last call, so that its memory is free again.

        A GPU frees what a piece of work made only when all of that piece is done, and takes pieces faster than it does
        them: without this all pairs' errors of every weight are in memory at once.
        """
        if not self._cpu and g.nbytes >= _PACED_BYTES:
            mx.async_eval(best.ranked)
            mx.eval(self._ahead)
            self._ahead = best.error

    def _try_around(
        self,
        best: _Best,
        g: mx.array,
        weights: mx.array | None,
        scale: mx.array,
        centre: mx.array,
        offsets: list[float],
    ) -> None:
        """Try biases that put the middle of the grid at parts of a step around `centre`."""
        bias = centre - scale * self._top / 2
        for offset in offsets:
            self._consider(best, g, weights, scale, bias, offset)

    def _consider(
        self, best: _Best, g: mx.array, weights: mx.array | None, scale: mx.array, bias: mx.array, offset: float = 0.0
    ) -> None:
        extra = () if weights is None else (weights,)
        scale, bias, inverse = self._stored(best, scale, bias, offset)
        error = self._kernels.squares(g, inverse, scale, bias, self._top, *extra).sum(0, keepdims=True)
        best.ranked = self._kernels.rank(error, scale, bias, *best.ranked)

    def _stored(self, best: _Best, scale: mx.array, bias: mx.array, offset: float = 0.0) -> list[mx.array]:
        return self._kernels.store(scale, bias, mx.array(offset), best.unit, best.low, best.high, self._top)

    def _refine(
        self, g: mx.array, weights: mx.array | None, scale: mx.array, bias: mx.array, rounds: int
    ) -> tuple[mx.array, mx.array]:
        """Alternating least squares: codes for the pair, then the pair that fits the codes best."""
        if weights is None:
            total, mean = mx.full((1, 1), self._size, dtype=mx.float32), g.mean(0, keepdims=True)
        else:
            total = weights.sum(0, keepdims=True)
            mean = (weights * g).sum(0, keepdims=True) / total
        extra = () if weights is None else (weights,)
        inverse = 1 / mx.where(scale == 0, 1.0, scale)
        for _ in range(rounds):
            moments = self._kernels.moments(g, inverse, bias, self._top, *extra)
            sums = [m.sum(0, keepdims=True) for m in moments]
            scale, bias, inverse = self._kernels.fit(*sums, total, mean, scale, bias)
        return scale, bias


class _Kernels(NamedTuple):
    """The elementwise work of the search, each function one fused kernel where MLX can compile."""

    codes: Callable[..., mx.array]
    squares: Callable[..., mx.array]
    moments: Callable[..., list[mx.array]]
    store: Callable[..., list[mx.array]]
    rank: Callable[..., list[mx.array]]
    fit: Callable[..., list[mx.array]]


def inverse_of(scale: mx.array) -> mx.array:
    """The inverse of a scale; 0 for one that is stored as 0, which leaves only the bias, whatever the code."""
    return mx.where(scale == 0, 0.0, 1 / mx.where(scale == 0, 1.0, scale))


def to_codes(values: mx.array, inverse: mx.array, bias: mx.array, top: mx.array, *, cpu: bool) -> mx.array:
    """The nearest codes, as whole float32 numbers from 0 to `top`."""
    at = (values - bias) * inverse
    # A GPU rounds fast, and its compiler might simplify the addition away; a CPU's library call is no vector code.
    rounded = (at + _ROUNDER) - _ROUNDER if cpu else mx.round(at)
    return mx.minimum(mx.maximum(rounded, 0), top)


@functools.cache
def _kernels(cpu: bool, compiled: bool, dtype: mx.Dtype) -> _Kernels:
    """Make them. Everything that varies is an argument, since each constant would mean another kernel."""
    codes = functools.partial(to_codes, cpu=cpu)

    def squares(
        g: mx.array, inverse: mx.array, scale: mx.array, bias: mx.array, top: mx.array, weights: mx.array | None = None
    ) -> mx.array:
        square = mx.square(g - (codes(g, inverse, bias, top) * scale + bias))
        return square if weights is None else square * weights

    def moments(
        g: mx.array, inverse: mx.array, bias: mx.array, top: mx.array, weights: mx.array | None = None
    ) -> list[mx.array]:
        q = codes(g, inverse, bias, top)
        weighted = q if weights is None else q * weights
        return [weighted, weighted * q, weighted * g]

    def store(
        scale: mx.array, bias: mx.array, offset: mx.array, unit: mx.array, low: mx.array, high: mx.array, top: mx.array
    ) -> list[mx.array]:
        bias = bias + scale * offset
        scale, bias = ((x * unit).astype(dtype).astype(mx.float32) / unit for x in (scale, bias))
        inverse, room = inverse_of(scale), _MOST / unit
        ends = [codes(end, inverse, bias, top) * scale for end in (low, high)]
        fits = [(mx.abs(end) <= room) & (mx.abs(end + bias) <= room) for end in ends]
        # A scale that takes unpacking out of range gets an error that is no number, which is never the least.
        scale = mx.where(fits[0] & fits[1], scale, float("inf"))
        return [scale, bias, inverse_of(scale)]

    def rank(error: mx.array, scale: mx.array, bias: mx.array, *ranked: mx.array) -> list[mx.array]:
        new, kept = [error, scale, bias], []
        for i in range(0, len(ranked), 3):
            old = ranked[i : i + 3]
            better = new[0] < old[0]
            kept += [mx.where(better, n, o) for n, o in zip(new, old, strict=True)]
            new = [mx.where(better, o, n) for n, o in zip(new, old, strict=True)]
        return kept

    def fit(
        q: mx.array, qq: mx.array, qg: mx.array, total: mx.array, mean: mx.array, scale: mx.array, bias: mx.array
    ) -> list[mx.array]:
        mean_q = q / total
        spread = qq - q * mean_q
        slope = (qg - q * mean) / mx.maximum(spread, 1e-12)
        fits = (spread > 1e-6) & (mx.abs(slope) > 1e-30)
        scale, bias = mx.where(fits, slope, scale), mx.where(fits, mean - slope * mean_q, bias)
        return [scale, bias, inverse_of(scale)]

    every: tuple[Any, ...] = (codes, squares, moments, store, rank, fit)
    return _Kernels(*(mx.compile(kernel) if compiled else kernel for kernel in every))


def _spread(low: float, high: float, count: int) -> list[float]:
    """The middles of `count` even parts of the interval."""
    return [low + (high - low) * (i + 0.5) / count for i in range(count)]


def _grids(g: mx.array, low: mx.array, high: mx.array, bits: int, dtype: mx.Dtype) -> list[tuple[mx.array, mx.array]]:
    """Pairs that fit a group whose weights lie on evenly spaced levels already, as trained for quantization."""
    top = 2**bits - 1
    span = high - low
    if top <= 15:
        # Every number of steps that the group may span.
        return [(span / steps, low) for steps in range(1, top + 1)]
    # The largest common divisor of the differences between neighbouring values, by Euclid's algorithm on all of
    # them at once. Differences below what the dtype can resolve are rounding, not steps.
    ordered = mx.sort(g, axis=0)
    gaps = ordered[1:] - ordered[:-1]
    resolution = float(mx.finfo(dtype).eps) * mx.maximum(mx.abs(high), mx.abs(low))
    far = mx.maximum(span, 1e-30)
    unit = mx.where(gaps > resolution, gaps, far).min(0, keepdims=True)
    for _ in range(4):
        rest = mx.abs(gaps - unit * mx.round(gaps / unit))
        unit = mx.where(rest > resolution + 1e-3 * unit, rest, unit).min(0, keepdims=True)
    steps = mx.round(span / unit)
    return [(span / mx.clip(steps + d, 1, top), low) for d in (0, -1, 1)]


@functools.cache
def can_compile(device: mx.DeviceType) -> bool:
    """True where `mx.compile` works: on a CPU it needs a C++ compiler at run time, which not every machine has."""
    del device  # the cache's key
    try:
        mx.eval(mx.compile(lambda x: mx.square(x - 1) * x)(mx.ones((2, 3))))
    except RuntimeError:
        return False
    return True
