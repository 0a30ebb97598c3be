"""The memory of what Metal does in its own way: products, reductions, fused attention and norms (mlx/backend/metal)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from mlx_tune.graphs.backends import METAL_NORM_GROUPS, Rules
from mlx_tune.graphs.simulating import gpu
from mlx_tune.graphs.simulating.allocator import Effect, table
from mlx_tune.graphs.simulating.layouts import Layout

if TYPE_CHECKING:
    from mlx_tune.graphs.graph import Node
    from mlx_tune.graphs.simulating.allocator import Allocator


def _matmul(rules: Rules) -> Effect:
    def effect(m: Allocator, node: Node) -> None:
        """Matrices with any distance between rows or columns are read where they lie; others are copied first."""
        out = node.outputs[0]
        m.allocate(out)
        for value in node.inputs[:2]:
            shape = m.shape(value)
            rows, columns = m.layout[value].strides[-2:]
            vector = 1 in shape[-2:]
            plain = columns == 1 and (not vector or rows == shape[-1])
            if not (plain or (rows == 1 and (not vector or columns == shape[-2]))):
                m.copy_of(value, out)
        m.launches += 1
        if parts := _parts(m, node, rules.split_tiles):
            m.launches += 1
            m.temporary(4 * parts * prod(m.shape(out)), out)

    return effect


def _parts(m: Allocator, node: Node, most_tiles: int) -> int:
    """Parts, each with its sum, of a small product of long rows (`steel_gemm_splitk_axpby`); 0 for none."""
    *batch, rows, columns = m.shape(node.outputs[0])
    length = m.shape(node.inputs[0])[-1]
    tiles, long = -(-rows // 16) * -(-columns // 16), length // 16
    split = prod(batch) == 1 and min(rows, columns) > 1 and max(rows, columns) <= length and long >= 8
    if not split or tiles > most_tiles:
        return 0
    return min(max(2, 1 << (max(long // tiles, 1) - 1).bit_length()), 32)


def quantized_matmul(m: Allocator, node: Node) -> None:
    """Activations, weights, scales and biases must lie in rows."""
    out = node.outputs[0]
    for value in node.inputs:
        gpu.rows_of(m, value, out)
    m.launches += 1
    for made in node.outputs:
        m.allocate(made)


def reduced(m: Allocator, node: Node) -> None:
    """Reductions read any layout; that of a large array to one number takes two kernels."""
    value, out = node.inputs[0], node.outputs[0]
    m.allocate(out)
    m.launches += 1 + (prod(m.shape(out)) == 1 and m.nbytes(value) > 1 << 26)


def concatenated(m: Allocator, node: Node) -> None:
    """One buffer, and a copy for each part."""
    m.allocate(node.outputs[0])
    m.launches += len(node.inputs)


def attention(m: Allocator, node: Node) -> None:
    """Attention by one kernel; the output lies with the heads of a row side by side."""
    out = node.outputs[0]
    for value in node.inputs:
        if m.layout[value].strides[-1:] != (1,):
            m.copy_of(value, out)
    batch, heads, rows, width = m.shape(out)
    strides = (rows * heads * width, width, heads * width, 1)
    m.allocate(out, Layout(strides, batch * heads * rows * width, True, False, False))
    for made in node.outputs[1:]:
        m.allocate(made)
    m.launches += 1


def attention_gradients(m: Allocator, node: Node) -> None:
    """Its backward pass: one kernel for the queries' gradient and one for the others, and one number a row."""
    queries = node.inputs[0]
    for value in node.inputs:
        if m.layout[value].strides[-1:] != (1,):
            m.copy_of(value, node.outputs[0])
    for out in node.outputs:
        m.allocate(out)
    m.launches += 2
    m.temporary(4 * prod(m.shape(queries)[:-1]), node.outputs[0])


def norm_gradients(m: Allocator, node: Node) -> None:
    """Sums for the weights in groups of rows."""
    rows = prod(m.shape(node.inputs[0])[:-1])
    groups = -(-rows // -(-rows // METAL_NORM_GROUPS)) if rows else 0
    if gpu.norm_gradients(m, node, groups, m.itemsize(node.outputs[1])):
        m.launches += 1


def METAL(rules: Rules) -> dict[str, tuple[Effect, str]]:  # noqa: N802
    """Primitive, its effect on memory, and the file under mlx/backend that it follows."""
    return {
        **table(_matmul(rules), "metal/matmul.cpp", "Matmul AddMM GatherMM SegmentedMM BlockMaskedMM"),
        **table(quantized_matmul, "metal/quantized.cpp", "QuantizedMatmul GatherQMM Quantize"),
        **table(reduced, "metal/reduce.cpp", "Reduce"),
        **table(concatenated, "metal/slicing.cpp", "Concatenate"),
        **table(gpu.sorted_afresh, "metal/sort.cpp", "Sort Partition"),
        **table(gpu.logsumexp, "metal/logsumexp.cpp", "LogSumExp"),
        **table(gpu.norm, "metal/normalization.cpp", "RMSNorm LayerNorm"),
        **table(norm_gradients, "metal/normalization.cpp", "RMSNormVJP LayerNormVJP"),
        **table(gpu.rope, "metal/rope.cpp", "RoPE"),
        **table(gpu.cross_entropy, "metal/cross_entropy.cpp", "CrossEntropy"),
        **table(gpu.cross_entropy_gradient, "metal/cross_entropy.cpp", "CrossEntropyVJP"),
        **table(attention, "metal/scaled_dot_product_attention.cpp", "ScaledDotProductAttention"),
        **table(attention_gradients, "metal/scaled_dot_product_attention.cpp", "ScaledDotProductAttentionVJP"),
    }
