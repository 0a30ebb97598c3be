"""Layouts against what MLX's own arrays show through the buffer protocol."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.graphs.simulating import layouts

pytestmark = pytest.mark.cpu_only

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


def strides_of(array: mx.array) -> tuple[int, ...]:
    """The strides in elements of an evaluated array."""
    mx.eval(array)
    view = memoryview(array)
    return tuple(s // view.itemsize for s in view.strides)


def significant(strides: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """Strides of the axes that have more than one element."""
    return [s for s, n in zip(strides, shape, strict=True) if n > 1]


@st.composite
def views(draw: st.DrawFn) -> tuple[mx.array, layouts.Layout]:
    """An array behind a random chain of views, and the layout that the chain gives."""
    shape = draw(shapes)
    array, layout = mx.zeros(shape), layouts.row_major(shape)
    for kind in draw(st.lists(st.sampled_from(["transpose", "slice", "broadcast", "expand"]), max_size=3)):
        shape = tuple(array.shape)
        if kind == "transpose":
            axes = draw(st.permutations(range(len(shape))))
            array, layout = array.transpose(*axes), layouts.transpose(shape, layout, axes)
        elif kind == "slice":
            step = draw(st.integers(1, 2))
            array = array[(..., slice(None, None, step))]
            layout = layouts.slice_view(layout, [1] * (len(shape) - 1) + [step], array.shape)
        elif kind == "broadcast":
            array = mx.broadcast_to(array, (2, *shape))
            layout = layouts.broadcast(shape, layout, (2, *shape))
        else:
            array, layout = mx.expand_dims(array, 0), layouts.expand(layout, [0])
    return array, layout


@settings(max_examples=60, deadline=None)
@given(views())
def test_views_have_the_strides_that_mlx_gives_them(view: tuple[mx.array, layouts.Layout]) -> None:
    array, layout = view
    assert significant(layout.strides, array.shape) == significant(strides_of(array), array.shape)


@settings(max_examples=60, deadline=None)
@given(views(), st.data())
def test_a_reshape_copies_exactly_where_mlx_copies(view: tuple[mx.array, layouts.Layout], data: st.DataObject) -> None:
    array, layout = view
    target = data.draw(st.sampled_from([(-1,), (array.shape[0], -1), (-1, array.shape[-1]), (1, -1, 1)]))
    mx.eval(array)
    out = array.reshape(target)
    if tuple(out.shape) == tuple(array.shape):
        return  # MLX returns the array itself
    mx.synchronize()  # what is no longer needed is let go of by now
    before = mx.get_active_memory()
    mx.eval(out)
    mx.synchronize()
    copied = mx.get_active_memory() > before
    predicted = layouts.reshape(array.shape, layout, out.shape)
    assert (predicted is None) == copied
    if predicted is not None:
        assert significant(predicted.strides, out.shape) == significant(strides_of(out), out.shape)


def test_splitting_and_squeezing_keep_strides() -> None:
    array = mx.zeros((4, 1, 6))
    layout = layouts.row_major((4, 1, 6))
    part = mx.split(array, 2, axis=2)[1]
    assert layouts.split_view(layout, (4, 1, 3)).strides == layout.strides
    assert significant(strides_of(part), part.shape) == [6, 1]
    assert layouts.squeeze(layout, [1]).strides == strides_of(array.squeeze(1))


def test_as_strided_knows_overlaps_from_gaps() -> None:
    overlapping = layouts.as_strided((3, 4), (2, 1))
    assert (overlapping.data_size, overlapping.contiguous) == (8, False)
    assert layouts.as_strided((2, 4), (4, 1)).row
