"""The memory of what CUDA does in its own way: products, reductions, fused attention and norms (mlx/backend/cuda)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from mlx_tune.graphs.backends import RMS_NORM_BLOCKS, WORKSPACE, Rules
from mlx_tune.graphs.simulating import gpu
from mlx_tune.graphs.simulating.allocator import Effect, table

if TYPE_CHECKING:
    from mlx_tune.graphs.graph import Node
    from mlx_tune.graphs.simulating.allocator import Allocator


def matmul(m: Allocator, node: Node) -> None:
    """cuBLAS takes plain and transposed matrices; other layouts are copied first."""
    gathered(m, node)
    if not _in_one_batch(m, node):
        m.launches += 1
        m.temporary(3 * 8 * prod(m.shape(node.outputs[0])[:-2]), node.outputs[0])


def addmm(m: Allocator, node: Node) -> None:
    """As `matmul`. The third input is read where it lies in rows, else copied into the output first."""
    rows = m.layout[node.inputs[2]].strides[-1:] == (1,)
    m.launches += not rows
    matmul(m, node)


def gathered(m: Allocator, node: Node) -> None:
    """One product for many pairs of matrices, which a kernel finds itself; other layouts are copied first."""
    out = node.outputs[0]
    m.allocate(out)
    for value in node.inputs[:2]:
        (rows, columns), shape = m.layout[value].strides[-2:], m.shape(value)
        if not ((columns == 1 and rows == shape[-1]) or (rows == 1 and columns == shape[-2])):
            m.copy_of(value, out)
    m.launches += 1
    m.temporary(WORKSPACE, out)


def _in_one_batch(m: Allocator, node: Node) -> bool:
    """Matrices that lie at equal distances; the places of others are written down first (`CublasGemm::run_batched`)."""
    batch = m.shape(node.outputs[0])[:-2]
    steps: list[tuple[int, ...]] = []
    for i in range(len(batch)):
        if batch[i] == 1:
            continue
        at = tuple(m.layout[v].strides[i] for v in node.inputs[:2])
        if steps and all(step == batch[i] * now for step, now in zip(steps[-1], at, strict=True)):
            steps.pop()
        steps.append(at)
    return len(steps) <= 1


def quantized_matmul(m: Allocator, node: Node) -> None:
    """The activations must lie in rows; the packed weights are read where they lie."""
    out = node.outputs[0]
    gpu.rows_of(m, node.inputs[0], out)
    m.launches += 1
    m.allocate(out)


def gather_quantized_matmul(m: Allocator, node: Node) -> None:
    """As `quantized_matmul`; the indices must lie in rows as well."""
    for value in node.inputs[-2:]:
        gpu.rows_of(m, value, node.outputs[0])
    quantized_matmul(m, node)


def quantize(m: Allocator, node: Node) -> None:
    """Every array in rows."""
    for value in node.inputs:
        gpu.rows_of(m, value, node.outputs[0])
    m.launches += 1
    for out in node.outputs:
        m.allocate(out)


def reduced(m: Allocator, node: Node) -> None:
    """A reduction copies what has gaps or repeats first; that of a large array to one number takes two kernels."""
    value, out = node.inputs[0], node.outputs[0]
    shape, layout, axes = m.shape(value), m.layout[value], node.arguments[1]
    m.allocate(out)
    if prod(shape) != prod(m.shape(out)):
        repeated = any(layout.strides[i] == 0 and n > 1 for i, n in enumerate(shape) if i not in axes)
        if repeated or not layout.contiguous:
            m.copy_of(value, out)
        m.launches += prod(m.shape(out)) == 1 and _blocks(prod(shape), m.itemsize(value)) > 1
    m.launches += 1


def _blocks(size: int, itemsize: int) -> int:
    """Thread blocks of a reduction of everything: `get_args` in cuda/reduce/all_reduce.cu."""
    reads = 16 // itemsize
    threads = -(-min(512, -(-size // reads)) // 32) * 32
    return 1 if -(-size // (threads * reads)) < 32 else 32


def concatenated(m: Allocator, node: Node) -> None:
    """One buffer; a copy for each part, side by side, and an empty node behind them (`concurrent_context`)."""
    m.allocate(node.outputs[0])
    m.launches += len(node.inputs) + 1


def attention(m: Allocator, node: Node) -> None:
    """cuDNN's attention: an output that lies as the queries do, and the log-sum-exp of each row while training."""
    queries, out = node.inputs[0], node.outputs[0]
    for value in node.inputs:
        if m.layout[value].strides[-1:] != (1,):
            m.copy_of(value, out)
    m.allocate(out, gpu.like(m.shape(out), m.layout[queries]))
    for made in node.outputs[1:]:
        m.allocate(made)
    m.launches += 1
    m.temporary(WORKSPACE, out)


def attention_gradients(m: Allocator, node: Node) -> None:
    """Its backward pass: gradients that lie as what they are of, and float32 sums.

    cuDNN adds the queries' gradient up in float32, holds one number a row, and where several heads of queries share
    keys it makes the keys' and values' gradients for every head first (cudnn-frontend, node of `sdpa_backward`).
    """
    queries, keys, values = node.inputs[:3]
    for value in node.inputs:
        if m.layout[value].strides[-1:] != (1,):
            m.copy_of(value, node.outputs[0])
    for value, out in zip((queries, keys, values), node.outputs, strict=True):
        m.allocate(out, gpu.like(m.shape(out), m.layout[value]))
    batch, heads, rows, width = m.shape(queries)
    shared = heads != m.shape(keys)[1]
    expanded = m.itemsize(keys) * batch * heads * m.shape(keys)[2] * (width + m.shape(values)[-1]) if shared else 0
    m.launches += 1
    m.temporary(4 * batch * heads * rows * (width + 1) + expanded + WORKSPACE, node.outputs[0])


def _rms_norm_gradients(rules: Rules) -> Effect:
    def effect(m: Allocator, node: Node) -> None:
        """Sums for the weights in float32, one row for each thread block, and then one row of them."""
        rows = prod(m.shape(node.inputs[0])[:-1])
        blocks = min(RMS_NORM_BLOCKS * rules.units, rows)
        if gpu.norm_gradients(m, node, blocks, 4):
            m.launches += 1
            if m.itemsize(node.outputs[1]) != 4:
                m.launches += 1
                m.temporary(4 * m.shape(node.inputs[1])[0], node.outputs[1])

    return effect


def layer_norm_gradients(m: Allocator, node: Node) -> None:
    """A row of sums for each row of the input."""
    rows = prod(m.shape(node.inputs[0])[:-1])
    if gpu.norm_gradients(m, node, rows, m.itemsize(node.outputs[1])):
        m.launches += 2


def CUDA(rules: Rules) -> dict[str, tuple[Effect, str]]:  # noqa: N802
    """Primitive, its effect on memory, and the file under mlx/backend that it follows."""
    return {
        **table(matmul, "cuda/matmul.cpp", "Matmul"),
        **table(gathered, "cuda/matmul.cpp", "GatherMM SegmentedMM BlockMaskedMM"),
        **table(addmm, "cuda/matmul.cpp", "AddMM"),
        **table(quantized_matmul, "cuda/quantized/quantized.cpp", "QuantizedMatmul"),
        **table(gather_quantized_matmul, "cuda/quantized/quantized.cpp", "GatherQMM"),
        **table(quantize, "cuda/quantized/quantized.cpp", "Quantize"),
        **table(reduced, "cuda/reduce.cu", "Reduce"),
        **table(concatenated, "cuda/slicing.cpp", "Concatenate"),
        **table(gpu.sorted_afresh, "cuda/sort.cu", "Sort Partition"),
        **table(gpu.logsumexp, "cuda/logsumexp.cu", "LogSumExp"),
        **table(gpu.norm, "cuda/rms_norm.cu, cuda/layer_norm.cu", "RMSNorm LayerNorm"),
        **table(_rms_norm_gradients(rules), "cuda/rms_norm.cu", "RMSNormVJP"),
        **table(layer_norm_gradients, "cuda/layer_norm.cu", "LayerNormVJP"),
        **table(gpu.rope, "cuda/rope.cu", "RoPE"),
        **table(gpu.cross_entropy, "cuda/cross_entropy.cu", "CrossEntropy"),
        **table(gpu.cross_entropy_gradient, "cuda/cross_entropy.cu", "CrossEntropyVJP"),
        **table(attention, "cuda/scaled_dot_product_attention.cpp", "ScaledDotProductAttention"),
        **table(attention_gradients, "cuda/scaled_dot_product_attention.cpp", "ScaledDotProductAttentionVJP"),
    }
