"""Working memory on CUDA: the figures are those that MLX reported on an H200, to the byte."""

from __future__ import annotations

import mlx.core as mx
import pytest
from gpu_effects import run

from mlx_tune.graphs.simulating.layouts import row_major, transpose

PAGE = 16384


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "rows", "width", "peak"),
    [
        (1, 32, 8, 1024, 64, 27_541_760),
        (4, 32, 8, 1024, 64, 110_117_120),
        (8, 32, 8, 1024, 64, 220_217_600),
        (4, 16, 8, 2048, 128, 235_946_240),
        (4, 32, 8, 1024, 128, 219_169_024),
        (2, 8, 8, 1024, 64, 12_730_624),
    ],
)
def test_attention_forward_and_backward_take_what_cudnn_asks_for(
    batch: int, heads: int, kv_heads: int, rows: int, width: int, peak: int
) -> None:
    q, kv, sums = (batch, heads, rows, width), (batch, kv_heads, rows, width), (batch, heads, rows, 1)
    dtypes = [mx.bfloat16] * 4 + [mx.float32]
    _, forward, _ = run("cuda", "ScaledDotProductAttention", [q, kv, kv], [q, sums], dtypes=dtypes)
    kinds = [mx.bfloat16] * 4 + [mx.float32]
    inputs = [q, kv, kv, q, sums, q]
    _, backward, kernels = run("cuda", "ScaledDotProductAttentionVJP", inputs, [q, kv, kv], dtypes=kinds)
    assert forward + backward == peak
    assert kernels == 1


def test_attention_lies_as_its_queries_do() -> None:
    shape, turned = (2, 4, 128, 64), transpose((2, 128, 4, 64), row_major((2, 128, 4, 64)), (0, 2, 1, 3))
    m, _, kernels = run("cuda", "ScaledDotProductAttention", [shape] * 3, [shape], layouts=[turned] * 3)
    assert m.layout[3].strides == turned.strides
    assert kernels == 1
    # Where the last axis has gaps, a copy comes first.
    gaps = transpose((2, 4, 64, 128), row_major((2, 4, 64, 128)), (0, 1, 3, 2))
    _, plain, _ = run("cuda", "ScaledDotProductAttention", [shape] * 3, [shape])
    _, copied, kernels = run("cuda", "ScaledDotProductAttention", [shape] * 3, [shape], layouts=[gaps, None, None])
    assert copied - plain == 2 * 2 * 4 * 128 * 64
    assert kernels == 2


def test_the_gradient_of_rms_norm_has_sums_for_each_block_of_threads() -> None:
    x, w = (8192, 2048), (2048,)
    _, taken, kernels = run("cuda", "RMSNormVJP", [x, w, x], [x, w])
    assert taken == 37_892_096
    assert kernels == 3  # the rows, their sum, and the sum in bfloat16
    _, in_place, _ = run("cuda", "RMSNormVJP", [x, w, x], [x, w], donated=[2])
    assert taken - in_place == 2 * 8192 * 2048


def test_the_gradient_of_layer_norm_has_a_row_for_each_row() -> None:
    x, w = (8192, 2048), (2048,)
    assert run("cuda", "LayerNormVJP", [x, w, w, x], [x, w, w])[1] == 67_117_056


def test_a_product_copies_what_is_neither_plain_nor_transposed_and_has_a_small_workspace() -> None:
    _, taken, kernels = run("cuda", "Matmul", [(64, 32), (32, 64)], [(64, 64)])
    assert (taken, kernels) == (2 * 64 * 64 + 256, 1)
    wide = row_major((64, 64))._replace(data_size=64 * 64, contiguous=False, row=False)
    _, copied, kernels = run("cuda", "Matmul", [(64, 32), (32, 64)], [(64, 64)], layouts=[wide])
    assert (copied - taken, kernels) == (2 * 64 * 32, 2)
    third = run("cuda", "AddMM", [(64, 32), (32, 64), (64, 64)], [(64, 64)])
    assert third[1:] == (taken, 1)


@pytest.mark.parametrize(("rows", "kernels"), [(4, 1), (8192, 2)])
def test_all_of_a_large_array_is_added_up_in_two_kernels(rows: int, kernels: int) -> None:
    everything = run("cuda", "Reduce", [(rows, 2048)], [(1, 1)], arguments=(2, (0, 1)))
    assert everything[2] == kernels
    assert run("cuda", "Reduce", [(rows, 2048)], [(rows, 1)], arguments=(2, (1,)))[2] == 1


def test_a_reduction_copies_what_is_repeated_along_an_axis_that_stays() -> None:
    repeated = row_major((64, 64))._replace(strides=(0, 1), data_size=64, row=False, col=False)
    _, taken, kernels = run("cuda", "Reduce", [(64, 64)], [(64, 1)], layouts=[repeated], arguments=(2, (1,)))
    assert (taken, kernels) == (128 + 2 * 64 * 64, 2)
    assert run("cuda", "Reduce", [(64, 64)], [(1, 64)], layouts=[repeated], arguments=(2, (0,)))[2] == 1


def test_parts_are_copied_side_by_side_with_an_empty_node_behind_them() -> None:
    assert run("cuda", "Concatenate", [(8, 8)] * 3, [(24, 8)])[2] == 4


def test_packed_products_copy_activations_alone() -> None:
    shapes = [(64, 128), (256, 16), (256, 2), (256, 2)]
    turned = transpose((128, 64), row_major((128, 64)), (1, 0))
    plain = run("cuda", "QuantizedMatmul", shapes, [(64, 256)])
    copied = run("cuda", "QuantizedMatmul", shapes, [(64, 256)], layouts=[turned])
    assert (plain[2], copied[2], copied[1] - plain[1]) == (1, 2, 2 * 64 * 128)
    assert run("cuda", "Quantize", [(64, 128)], [(64, 16), (64, 2), (64, 2)])[2] == 1
    gathered = run("cuda", "GatherQMM", [*shapes, (64,), (64,)], [(64, 256)])
    assert gathered[2] == 1


def test_matrices_at_unequal_distances_have_their_places_written_down_first() -> None:
    """Queries in groups that share keys: the places of 4 x 8 x 2 matrices, and a kernel that writes them."""
    queries, keys, scores = (4, 8, 2, 64, 32), (4, 8, 2, 32, 64), (4, 8, 2, 64, 64)
    plain = run("cuda", "Matmul", [queries, keys], [scores])
    shared = row_major(keys)._replace(strides=(8 * 2048, 2048, 0, 64, 1), data_size=4 * 8 * 2048, row=False, col=False)
    grouped = run("cuda", "Matmul", [queries, keys], [scores], layouts=[None, shared])
    assert (plain[2], grouped[2]) == (1, 2)
    assert grouped[1] - plain[1] == 2048  # three addresses for each, rounded up to a power of two
    alike = row_major(keys)._replace(strides=(0, 0, 0, 64, 1), data_size=2048, row=False, col=False)
    assert run("cuda", "Matmul", [queries, keys], [scores], layouts=[None, alike])[2] == 1


def test_products_of_experts_are_one_kernel_whatever_the_tokens_dimensions() -> None:
    shapes = [(2, 16, 1, 1, 32), (4, 32, 64), (2, 16, 1), (2, 16, 2)]
    assert run("cuda", "GatherMM", shapes, [(2, 16, 2, 1, 64)])[2] == 1
