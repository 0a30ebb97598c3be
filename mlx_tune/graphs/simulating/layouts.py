"""The layout of an array in its buffer: strides, contiguity, and what views make of them.

Copying, reusing or merely looking at an input depends on these, so they follow
mlx/backend/common (common.cpp, slicing.cpp, broadcasting.cpp, utils.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple


class Layout(NamedTuple):
    """Strides in elements, the elements that the buffer holds for it, and MLX's three contiguity flags."""

    strides: tuple[int, ...]
    data_size: int
    contiguous: bool = True
    row: bool = True
    col: bool = True


def row_major(shape: Sequence[int]) -> Layout:
    """The layout of a freshly made array."""
    return _row_major(tuple(shape))


@lru_cache(4096)  # the arrays of a step have few shapes
def _row_major(shape: tuple[int, ...]) -> Layout:
    size, strides = 1, []
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return Layout(tuple(reversed(strides)), size, True, True, size <= 1 or size == max(shape, default=1))


def contiguity(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, bool, bool]:
    """Elements without broadcast dimensions, and whether the layout is row or column contiguous."""
    elements, forward, backward, row, col = 1, 1, 1, True, True
    for i in range(len(shape)):
        j = len(shape) - 1 - i
        col = col and (strides[i] == forward or shape[i] == 1)
        row = row and (strides[j] == backward or shape[j] == 1)
        forward *= shape[i]
        backward *= shape[j]
        if strides[i] > 0:
            elements *= shape[i]
    return elements, row, col


def transpose(shape: Sequence[int], layout: Layout, axes: Sequence[int]) -> Layout:
    """The view with its axes permuted."""
    strides = tuple(layout.strides[a] for a in axes)
    if not (layout.contiguous and layout.data_size == prod(shape)):
        return Layout(strides, layout.data_size, layout.contiguous, layout.row, layout.col)
    _, row, col = contiguity([shape[a] for a in axes], strides)
    return Layout(strides, layout.data_size, True, row, col)


def broadcast(shape: Sequence[int], layout: Layout, out_shape: Sequence[int]) -> Layout:
    """The view that repeats along new or unit axes."""
    extra = len(out_shape) - len(shape)
    strides = (0,) * extra + tuple(0 if n == 1 else s for n, s in zip(shape, layout.strides, strict=True))
    if prod(out_shape) > prod(shape):
        return Layout(strides, layout.data_size, layout.contiguous, False, False)
    return Layout(strides, layout.data_size, layout.contiguous, layout.row, layout.col)


def slice_view(layout: Layout, steps: Sequence[int], out_shape: Sequence[int]) -> Layout:
    """The view of every `steps`-th element along each axis."""
    strides = tuple(s * step for s, step in zip(layout.strides, steps, strict=True))
    low = sum(s * (n - 1) for s, n in zip(strides, out_shape, strict=True) if s <= 0)
    high = sum(s * (n - 1) for s, n in zip(strides, out_shape, strict=True) if s > 0)
    data_size = high - low + 1
    elements, row, col = contiguity(out_shape, strides)
    return Layout(strides, data_size, elements == data_size, row, col)


def split_view(layout: Layout, out_shape: Sequence[int]) -> Layout:
    """The view of one part of a split array: the strides stay."""
    elements, row, col = contiguity(out_shape, layout.strides)
    if elements == 1:
        contiguous = True
    elif elements == layout.data_size:
        contiguous = layout.contiguous
    else:
        contiguous = layout.contiguous and (row or col)
    return Layout(layout.strides, elements, contiguous, row, col)


def squeeze(layout: Layout, axes: Sequence[int]) -> Layout:
    """The view without the given unit axes."""
    strides = tuple(s for i, s in enumerate(layout.strides) if i not in axes)
    return Layout(strides, layout.data_size, layout.contiguous, layout.row, layout.col)


def expand(layout: Layout, axes: Sequence[int]) -> Layout:
    """The view with unit axes put in."""
    strides = list(layout.strides)
    for axis in axes:
        strides.insert(axis, 1)
    return Layout(tuple(strides), layout.data_size, layout.contiguous, layout.row, layout.col)


def as_strided(shape: Sequence[int], strides: Sequence[int]) -> Layout:
    """The view with strides of its own."""
    high = sum(s * (n - 1) for s, n in zip(strides, shape, strict=True) if s >= 0)
    low = sum(s * (n - 1) for s, n in zip(strides, shape, strict=True) if s < 0)
    negative = any(s < 0 and n > 1 for s, n in zip(strides, shape, strict=True))
    data_size = high - low + 1 if prod(shape) else 0
    elements, row, col = contiguity(shape, strides)
    return Layout(tuple(strides), data_size, not negative and elements == data_size, row, col)


def _collapse(shape: Sequence[int], strides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Merge neighbouring axes that lie in memory as one; unit axes do not count."""
    sizes: list[int] = []
    steps: list[int] = []
    for n, s in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if sizes and s * n == steps[-1] and sizes[-1] * n <= 2**31 - 1:
            sizes[-1] *= n
            steps[-1] = s
        else:
            sizes.append(n)
            steps.append(s)
    return (sizes, steps) if sizes else ([1], [0])


def reshape(shape: Sequence[int], layout: Layout, out_shape: Sequence[int]) -> Layout | None:
    """The view with another shape, or None where only a copy can have it."""
    if prod(shape) == 0 or layout.row:
        size = prod(out_shape)
        return Layout(
            row_major(out_shape).strides,
            layout.data_size,
            layout.contiguous,
            layout.row,
            size <= 1 or size == max(out_shape, default=1) if layout.row else layout.col,
        )
    if not shape:
        return Layout((0,) * len(out_shape), layout.data_size, layout.contiguous, layout.row, layout.col)
    sizes, steps = _collapse(shape, layout.strides)
    strides: list[int] = []
    j = 0
    for n in out_shape:
        if j < len(sizes) and sizes[j] % n == 0:
            sizes[j] //= n
            strides.append(sizes[j] * steps[j])
            j += sizes[j] == 1
        elif n == 1:
            strides.append(strides[-1] if strides else 0)
        else:
            return None
    return Layout(tuple(strides), layout.data_size, layout.contiguous, layout.row, layout.col)
