import mlx.core as mx
import pytest

from mlx_tune.graphs.graph import Graph, Node, Value
from mlx_tune.graphs.simulating.allocator import Allocator
from mlx_tune.graphs.simulating.layouts import Layout, row_major, slice_view, transpose
from mlx_tune.graphs.simulating.matrix_products import addmm, gather_quantized_matmul, matmul, quantized_matmul


def added(operation, *layouts: Layout | None, shapes, out) -> int:
    """Bytes that an operation allocates, its inputs lying as they are said to; None lies in rows."""
    values = [Value(shape, mx.float32) for shape in (*shapes, out)]
    node = Node("Product", tuple(range(len(shapes))), (len(shapes),))
    m = Allocator(Graph(values, [node]), [0], references=[2] * len(values))
    for value, layout in enumerate(layouts):
        m.allocate(value)
        m.layout[value] = layout or m.layout[value]
    before = m.live
    operation(m, node)
    return m.live - before


PLAIN = row_major((8, 16))
TURNED = transpose((16, 8), row_major((16, 8)), (1, 0))
EVERY_OTHER = slice_view(row_major((8, 32)), (1, 2), (8, 16))
SIZE = 4 * 8 * 16
OUT = 4 * 8 * 24


@pytest.mark.parametrize(("layout", "copied"), [(PLAIN, 0), (TURNED, 0), (EVERY_OTHER, SIZE)])
def test_blas_takes_plain_and_transposed_matrices_and_a_copy_of_others(layout, copied):
    assert added(matmul, layout, None, shapes=[(8, 16), (16, 24)], out=(8, 24)) == OUT + copied
    shapes = [(8, 16), (16, 24), (8, 24)]
    assert added(addmm, layout, None, None, shapes=shapes, out=(8, 24)) == OUT + copied


@pytest.mark.parametrize(("layout", "copied"), [(PLAIN, 0), (TURNED, SIZE), (EVERY_OTHER, SIZE)])
def test_packed_products_take_rows_alone(layout, copied):
    shapes = [(8, 16), (24, 2), (24, 1), (24, 1)]
    assert added(quantized_matmul, layout, None, None, None, shapes=shapes, out=(8, 24)) == OUT + copied


def test_indices_of_a_gathered_product_are_read_where_they_lie():
    shapes = [(8, 16), (24, 2), (24, 1), (8, 16), (8, 16)]
    layouts = (None, None, None, EVERY_OTHER, TURNED)
    assert added(gather_quantized_matmul, *layouts, shapes=shapes, out=(8, 24)) == OUT
