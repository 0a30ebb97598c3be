"""Working memory on Metal, by the rules of its source; no figure was measured."""

from __future__ import annotations

import mlx.core as mx
import pytest
from gpu_effects import run

from mlx_tune.graphs.simulating.layouts import row_major


@pytest.mark.parametrize(
    ("rows", "length", "columns", "parts"),
    [
        (64, 4096, 64, 16),  # 256 steps of 16 over 16 tiles
        (64, 128, 64, 2),
        (4096, 4096, 4096, 0),  # more than 2,048 tiles
        (64, 64, 64, 0),  # too short
        (64, 128, 256, 0),  # wider than long
        (1, 4096, 64, 0),  # a vector
    ],
)
def test_small_products_of_long_rows_are_split(rows: int, length: int, columns: int, parts: int) -> None:
    _, taken, kernels = run("metal", "Matmul", [(rows, length), (length, columns)], [(rows, columns)])
    _, plain, _ = run("metal", "Sin", [(rows, columns)], [(rows, columns)])
    assert taken - plain == 4 * parts * rows * columns
    assert kernels == (2 if parts else 1)


def test_products_read_matrices_whose_rows_lie_apart() -> None:
    apart = row_major((64, 32))._replace(strides=(64, 1), data_size=64 * 64, contiguous=False, row=False)
    assert run("metal", "Matmul", [(64, 32), (32, 64)], [(64, 64)], layouts=[apart])[1:] == (2 * 64 * 64, 1)
    nothing_beside = row_major((64, 32))._replace(strides=(64, 2), contiguous=False, row=False)
    copied = run("metal", "Matmul", [(64, 32), (32, 64)], [(64, 64)], layouts=[nothing_beside])
    assert copied[1:] == (2 * 64 * 64 + 2 * 64 * 32, 2)


def test_attention_lies_with_its_heads_side_by_side() -> None:
    shape = (2, 4, 128, 64)
    m, taken, kernels = run("metal", "ScaledDotProductAttention", [shape] * 3, [shape])
    assert m.layout[3].strides == (128 * 4 * 64, 64, 4 * 64, 1)
    assert (taken, kernels) == (2 * 2 * 4 * 128 * 64, 1)
    kinds = [mx.bfloat16] * 4 + [mx.float32]
    inputs = [*[shape] * 4, (2, 4, 128, 1), shape]
    _, taken, kernels = run("metal", "ScaledDotProductAttentionVJP", inputs, [shape] * 3, dtypes=kinds)
    assert (taken, kernels) == (3 * 2 * 2 * 4 * 128 * 64 + 4 * 2 * 4 * 128, 2)


def test_gradients_of_norms_are_added_up_in_groups_of_rows() -> None:
    x, w = (8192, 2048), (2048,)
    _, taken, kernels = run("metal", "RMSNormVJP", [x, w, x], [x, w])
    assert taken == 2 * 8192 * 2048 + 2 * 512 * 2048 + 2 * 2048
    assert kernels == 2


def test_packed_products_read_rows_alone() -> None:
    shapes = [(64, 128), (256, 16), (256, 2), (256, 2)]
    scattered = row_major((256, 16))._replace(strides=(32, 1), contiguous=False, row=False)
    layouts = [None, scattered]
    assert run("metal", "QuantizedMatmul", shapes, [(64, 256)], layouts=layouts)[2] == 2


def test_parts_are_copied_one_by_one_and_sums_of_everything_take_two() -> None:
    assert run("metal", "Concatenate", [(8, 8)] * 3, [(24, 8)])[2] == 3
    assert run("metal", "Reduce", [(8192, 8192)], [(1, 1)], arguments=(2, (0, 1)))[2] == 2
