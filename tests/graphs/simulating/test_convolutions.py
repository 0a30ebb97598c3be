import mlx.core as mx
import pytest

from mlx_tune.graphs.graph import Graph, Node, Value
from mlx_tune.graphs.simulating.allocator import Allocator
from mlx_tune.graphs.simulating.convolutions import convolution

IMAGE, KERNEL, OUT = (2, 8, 8, 3), (5, 3, 3, 3), (2, 8, 8, 5)


def added(dtype=mx.float32, kernel=KERNEL, dilation=(1, 1), groups=1, flip=False) -> int:
    """Bytes that a convolution allocates, padded by one on each side."""
    values = [Value(IMAGE, dtype), Value(kernel, dtype), Value(OUT, dtype)]
    node = Node("Convolution", (0, 1), (2,), ((1, 1), (1, 1), (1, 1), dilation, (1, 1), groups, flip))
    m = Allocator(Graph(values, [node]), [0], references=[2] * 3)
    m.allocate(0)
    m.allocate(1)
    before = m.live
    convolution(m, node)
    return m.live - before


PADDED = 4 * 2 * 10 * 10 * 3
PATCHES = 4 * (2 * 8 * 8) * (3 * 3 * 3)
WEIGHTS = 4 * 5 * 3 * 3 * 3
RESULT = 4 * 2 * 8 * 8 * 5


def test_patches_are_unfolded_out_of_a_padded_copy():
    assert added() == RESULT + PADDED + PATCHES


def test_other_dtypes_are_computed_in_float32():
    assert added(mx.bfloat16) == RESULT // 2 + PADDED + PATCHES + WEIGHTS + RESULT


def test_a_flipped_kernel_is_copied():
    assert added(flip=True) == RESULT + PADDED + PATCHES + WEIGHTS


@pytest.mark.parametrize("how", [{"dilation": (2, 2)}, {"groups": 3, "kernel": (5, 3, 3, 1)}])
def test_what_cannot_be_a_product_is_computed_element_by_element(how):
    assert added(**how) == RESULT
