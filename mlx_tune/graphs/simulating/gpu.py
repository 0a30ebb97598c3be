"""Effects that CUDA and Metal share: which operations launch kernels, and the fused ones of `mx.fast`.

Most primitives do to memory what they do on a CPU, since donation and views are decided in mlx/backend/common; here
they are counted as kernels besides. Where the two backends differ, cuda.py and metal.py have the row.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from mlx_tune.graphs.simulating import layouts
from mlx_tune.graphs.simulating.layouts import Layout

if TYPE_CHECKING:
    from mlx_tune.graphs.graph import Node
    from mlx_tune.graphs.simulating.allocator import Allocator, Effect

#: Views launch a kernel only where they have to copy (mlx/backend/gpu/primitives.cpp).
_VIEWS = """
Copy Depends StopGradient CustomTransforms Reshape Flatten Unflatten Transpose Broadcast BroadcastAxes Slice Split
Squeeze ExpandDims AsStrided View Contiguous NumberOfElements
"""
#: Copies launch none where the input's buffer is handed on as it is (`copy_gpu` in cuda/copy.cu and metal/copy.cpp).
_COPIES = "AsType Full"
#: Copies that something is written into afterwards.
_WRITES = "SliceUpdate DynamicSliceUpdate Scatter ScatterAxis MaskedScatter"
_MORE = {"Pad": 1, "DynamicSlice": 1, "DynamicSliceUpdate": 1}


def launching(name: str, effect: Effect) -> Effect:
    """An effect that counts kernels as well."""
    view, copies, writes = name in _VIEWS.split(), name in _COPIES.split(), name in _WRITES.split()
    more = _MORE.get(name, 0)

    def counted(m: Allocator, node: Node) -> None:
        effect(m, node)
        if not (view or copies or writes):
            m.launches += 1 + more
            return
        value, out = (node.inputs or node.outputs)[0], node.outputs[0]
        moved = m.buffer[out] not in {m.buffer[v] for v in node.inputs}
        cast = copies and m.graph.values[value].dtype != m.graph.values[out].dtype
        m.launches += int(moved or cast) + writes + more

    return counted


def rows_of(m: Allocator, value: int, out: int) -> bool:
    """Copy a value that does not lie in rows; True where that was so."""
    if m.layout[value].row:
        return False
    m.copy_of(value, out)
    return True


def norm(m: Allocator, node: Node) -> None:
    """A norm of rows: in place where nothing else needs the input, else of the input's layout."""
    value, out = node.inputs[0], node.outputs[0]
    layout, width = m.layout[value], m.shape(value)[-1]
    plain = layout.contiguous and layout.strides[-1] == 1
    if plain and len(layout.strides) > 1:
        plain = layout.strides[-2] in (0, width) or m.shape(value)[-2] == 1
    m.launches += 1
    if not plain:
        m.launches += 1
        m.allocate(out)
    elif m.donatable(value):
        m.share(out, value)
    else:
        m.allocate(out, layout)


def rope(m: Allocator, node: Node) -> None:
    """Rotated in place where nothing else needs the input, else of the input's layout."""
    value, out = node.inputs[0], node.outputs[0]
    m.launches += 1
    if len(m.shape(value)) > 4 and not m.layout[value].row:
        m.launches += 1
        m.allocate(out)
    elif m.donatable(value):
        m.share(out, value)
    else:
        m.allocate(out, m.layout[value] if m.layout[value].contiguous else None)


def norm_gradients(m: Allocator, node: Node, groups: int, itemsize: int) -> bool:
    """Gradients of a norm: that of the input in place of the input or the cotangent, and sums for the weights.

    Args:
        m: The buffers.
        node: Reads the input, the weights and last the cotangent; makes the gradients in that order.
        groups: Rows of sums that are held before they are added up.
        itemsize: Bytes of one of them.

    Returns:
        True where the node has weights.
    """
    value, weight, cotangent, out = node.inputs[0], node.inputs[1], node.inputs[-1], node.outputs[0]
    own = [v for v in (value, cotangent) if m.layout[v].row and m.donatable(v)]
    copied = [v for v in (value, cotangent) if not m.layout[v].row]
    m.launches += 1 + len(copied)
    if own and (own[0] == value or value not in copied):
        m.share(out, own[0])
    else:
        m.allocate(out)
        copied = copied[1:]  # the copy is what the gradient is written into
    for one in copied:
        m.temporary(m.nbytes(one), out)
    has_weight = bool(m.shape(weight))
    if has_weight:
        m.temporary(groups * m.shape(value)[-1] * itemsize, out)
    for made in node.outputs[1:]:
        m.allocate(made)
    return has_weight


def cross_entropy(m: Allocator, node: Node) -> None:
    """One number a row."""
    for value in node.inputs:
        rows_of(m, value, node.outputs[0])
    m.launches += 1
    m.allocate(node.outputs[0])


def cross_entropy_gradient(m: Allocator, node: Node) -> None:
    """The logits' gradient, in their place where nothing else needs them."""
    logits, out = node.inputs[0], node.outputs[0]
    for value in node.inputs[1:]:
        rows_of(m, value, out)
    m.launches += 1
    if not m.layout[logits].row:
        m.launches += 1
        m.allocate(out)
    elif m.donatable(logits):
        m.share(out, logits)
    else:
        m.allocate(out)


def like(shape: tuple[int, ...], layout: Layout) -> Layout:
    """A full layout whose axes lie in the order of those of another."""
    if layout.row:
        return layouts.row_major(shape)
    order = sorted(range(len(shape)), key=lambda axis: layout.strides[axis] if layout.strides[axis] > 0 else 1)
    strides, step = [0] * len(shape), 1
    for axis in order:
        strides[axis] = step
        step *= shape[axis]
    return Layout(tuple(strides), prod(shape), True, False, False)


def logsumexp(m: Allocator, node: Node) -> None:
    """A reduction over the last axis, which must be contiguous."""
    value, out = node.inputs[0], node.outputs[0]
    layout = m.layout[value]
    if not (layout.contiguous and layout.strides[-1] == 1):
        m.copy_of(value, out)
    m.launches += 1
    m.allocate(out)


def sorted_afresh(m: Allocator, node: Node) -> None:
    """A sorted array of its own."""
    m.launches += 1
    m.allocate(node.outputs[0])
