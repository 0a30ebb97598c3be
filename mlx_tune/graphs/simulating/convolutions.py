"""The memory of convolutions on the CPU backend (mlx/backend/cpu/conv.cpp)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_tune.graphs.graph import Node
    from mlx_tune.graphs.simulating.allocator import Allocator


def convolution(m: Allocator, node: Node) -> None:
    """Convolution by one matrix product over unfolded, padded float32 patches, as far as the shapes allow."""
    value, weight, out = *node.inputs[:2], node.outputs[0]
    m.allocate(out)
    _, low, high, dilation, in_dilation, groups, flip = node.arguments[:7]  # the strides do not matter to memory
    shape, kernel = m.shape(value), m.shape(weight)
    plain = all(d == 1 for d in [*dilation, *in_dilation])
    if not plain or (groups > 1 and (len(shape) > 3 or flip)):
        return  # computed element by element
    padded_shape = [n + lo + hi for n, lo, hi in zip(shape[1:-1], low, high, strict=True)]
    m.temporary(4 * shape[0] * prod(padded_shape) * shape[-1], out)
    positions = shape[0] * prod(m.shape(out)[1:-1])
    m.temporary(4 * positions * prod(kernel[1:-1]) * shape[-1], out)
    float32 = m.itemsize(weight) == 4
    if groups > 1 or not float32 or not m.layout[weight].row:
        m.temporary(4 * prod(kernel), out)
    if flip:
        m.temporary(4 * prod(kernel), out)
    if m.itemsize(out) != 4:
        m.temporary(4 * prod(m.shape(out)), out)
