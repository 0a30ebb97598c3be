"""The memory of matrix products on the CPU backend: which layouts BLAS takes, and what is copied for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_tune.graphs.graph import Node
    from mlx_tune.graphs.simulating.allocator import Allocator


def matmul(m: Allocator, node: Node) -> None:
    """BLAS takes plain and transposed matrices; other layouts are copied first."""
    m.allocate(node.outputs[0])
    for value in node.inputs[:2]:
        _plain(m, value, node.outputs[0])


def addmm(m: Allocator, node: Node) -> None:
    """As `matmul`, into a copy of the third input."""
    layout = m.layout[node.inputs[2]]
    m.copied(node.inputs[2], node.outputs[0], layout.row and layout.data_size != 1)
    for value in node.inputs[:2]:
        _plain(m, value, node.outputs[0])


def quantized_matmul(m: Allocator, node: Node) -> None:
    """Every array must lie in a row; other layouts are copied first."""
    out = node.outputs[0]
    for value in node.inputs:
        m.rows(value, out)
    for made in node.outputs:
        m.allocate(made)


def gather_quantized_matmul(m: Allocator, node: Node) -> None:
    """As `quantized_matmul`, for the last two axes; the indices are read where they lie."""
    out = node.outputs[0]
    for value in node.inputs[:-2]:
        rows, columns = m.layout[value].strides[-2:]
        if rows != m.shape(value)[-1] or columns != 1:
            m.copy_of(value, out)
    m.allocate(out)


def _plain(m: Allocator, value: int, out: int) -> None:
    (rows, columns), shape = m.layout[value].strides[-2:], m.shape(value)
    if (rows == shape[-1] and columns == 1) or (rows == 1 and columns == shape[-2]):
        return
    m.copy_of(value, out)
