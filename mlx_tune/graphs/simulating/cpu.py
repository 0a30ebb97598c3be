"""The memory of each primitive on the CPU backend: views, donations, copies and temporaries.

One function a kind of primitive; convolutions and products have files of their own. The table at the end names for
each primitive its function and the upstream file that it was read from (MLX 0.32). GPUs differ in temporaries and in
fusing more: gpu.py, cuda.py and metal.py have their rows.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from mlx_tune.graphs.simulating import layouts
from mlx_tune.graphs.simulating.allocator import Effect, table
from mlx_tune.graphs.simulating.convolutions import convolution
from mlx_tune.graphs.simulating.layouts import Layout
from mlx_tune.graphs.simulating.matrix_products import addmm, gather_quantized_matmul, matmul, quantized_matmul

if TYPE_CHECKING:
    from mlx_tune.graphs.graph import Node
    from mlx_tune.graphs.simulating.allocator import Allocator


def fresh(m: Allocator, node: Node) -> None:
    """Every output gets a buffer of its own; inputs are read where they lie."""
    for out in node.outputs:
        m.allocate(out)


def unary(m: Allocator, node: Node) -> None:
    """Elementwise on one array: in place where nothing else needs it."""
    (value, *_), (out,) = node.inputs, node.outputs
    layout = m.layout[value]
    if not layout.contiguous:
        m.allocate(out)
    elif m.donatable(value, out):
        m.share(out, value)
    else:
        m.allocate(out, layout)


def binary(m: Allocator, node: Node) -> None:
    """Elementwise on two arrays: in place of either where its layout allows."""
    a, b = node.inputs
    out = node.outputs[0]
    x, y = m.layout[a], m.layout[b]
    if x.data_size == 1 and y.data_size == 1:
        m.allocate(out, Layout(x.strides, 1, x.contiguous, x.row, x.col))
        return
    if x.data_size == 1 and y.contiguous:
        candidates, layout = [b], y
    elif y.data_size == 1 and x.contiguous:
        candidates, layout = [a], x
    elif (x.row and y.row) or (x.col and y.col):
        candidates, layout = [a, b], x
    else:
        size = prod(m.shape(out))
        candidates = [v for v in (a, b) if m.layout[v].row and prod(m.shape(v)) == size]
        layout = layouts.row_major(m.shape(out))
    for value in candidates:
        if m.donatable(value, out):
            m.share(out, value)
            return
    m.allocate(out, layout)


def binary_two(m: Allocator, node: Node) -> None:
    """Elementwise on two arrays with two results."""
    x = m.layout[node.inputs[0]]
    y = m.layout[node.inputs[1]]
    same = (x.row and y.row) or (x.col and y.col)
    for out in node.outputs:
        m.allocate(out, x if same and x.data_size > 1 else None)


def ternary(m: Allocator, node: Node) -> None:
    """Selection between two arrays."""
    a, b, c = node.inputs
    out = node.outputs[0]
    x, y, z = (m.layout[v] for v in node.inputs)
    if x.data_size == y.data_size == z.data_size == 1:
        m.allocate(out, Layout(y.strides, 1, y.contiguous, y.row, y.col))
        return
    if (x.row and y.row and z.row) or (x.col and y.col and z.col):
        candidates, layout = [a, b, c], y
    else:
        candidates, layout = [v for v in node.inputs if m.layout[v].row], None
    for value in candidates:
        if m.donatable(value, out):
            m.share(out, value)
            return
    m.allocate(out, layout)


def compiled(m: Allocator, node: Node) -> None:
    """A chain of elementwise operations that `mx.compile` fused: no intermediates."""
    out = node.outputs[0]
    shape = m.shape(out)
    arrays = [v for v in node.inputs if prod(m.shape(v)) != 1]
    flags = [m.layout[v] for v in arrays]
    same = all(m.shape(v) == shape for v in arrays)
    rows, cols = same and all(f.row for f in flags), same and all(f.col for f in flags)
    if len(arrays) > 1:
        contiguous = rows or cols
    elif arrays:
        contiguous = same and flags[0].contiguous
    else:
        contiguous = shape == ()
    waiting = list(node.outputs)
    layout: Layout | None = None
    for value in node.inputs:
        if not waiting:
            break
        now = waiting[0]
        fits = m.itemsize(value) == m.itemsize(now) and m.donatable(value)  # constants are held, so never
        if contiguous:
            if fits and prod(m.shape(value)) != 1:
                m.share(waiting.pop(0), value)
            if layout is None and prod(m.shape(value)) == prod(shape):
                layout = m.layout[value]
        elif fits and m.layout[value].row and prod(m.shape(value)) == prod(m.shape(now)):
            m.share(waiting.pop(0), value, layouts.row_major(m.shape(now)))
    for value in waiting:
        m.allocate(value, layout if contiguous else None)


def same_buffer(m: Allocator, node: Node) -> None:
    """The outputs are the first inputs under another name."""
    for value, out in zip(node.inputs, node.outputs, strict=False):
        m.share(out, value)


def last_inputs(m: Allocator, node: Node) -> None:
    """The outputs are the last inputs under another name."""
    for value, out in zip(node.inputs[len(node.inputs) - len(node.outputs) :], node.outputs, strict=True):
        m.share(out, value)


def reshaped(m: Allocator, node: Node) -> None:
    """A view where the strides allow one, else a copy."""
    value, out = node.inputs[0], node.outputs[0]
    layout = layouts.reshape(m.shape(value), m.layout[value], m.shape(out))
    if layout is None:
        m.allocate(out)
        return
    m.share(out, value, layout)


def transposed(m: Allocator, node: Node) -> None:
    """A view with permuted axes."""
    value = node.inputs[0]
    m.share(node.outputs[0], value, layouts.transpose(m.shape(value), m.layout[value], node.arguments[0]))


def broadcasted(m: Allocator, node: Node) -> None:
    """A view that repeats."""
    value, out = node.inputs[0], node.outputs[0]
    m.share(out, value, layouts.broadcast(m.shape(value), m.layout[value], m.shape(out)))


def sliced(m: Allocator, node: Node) -> None:
    """A view of some elements; it keeps the whole buffer alive."""
    value, out = node.inputs[0], node.outputs[0]
    if prod(m.shape(out)) == 0:
        m.allocate(out)
        return
    m.share(out, value, layouts.slice_view(m.layout[value], node.arguments[2], m.shape(out)))


def split(m: Allocator, node: Node) -> None:
    """Views of parts; each keeps the whole buffer alive."""
    for out in node.outputs:
        m.share(out, node.inputs[0], layouts.split_view(m.layout[node.inputs[0]], m.shape(out)))


def squeezed(m: Allocator, node: Node) -> None:
    """A view without unit axes."""
    value = node.inputs[0]
    m.share(node.outputs[0], value, layouts.squeeze(m.layout[value], node.arguments[0]))


def expanded(m: Allocator, node: Node) -> None:
    """A view with more unit axes."""
    value = node.inputs[0]
    m.share(node.outputs[0], value, layouts.expand(m.layout[value], node.arguments[0]))


def strided(m: Allocator, node: Node) -> None:
    """A view with strides of its own."""
    value, out = node.inputs[0], node.outputs[0]
    m.share(out, value, layouts.as_strided(node.arguments[0], node.arguments[1]))


def viewed(m: Allocator, node: Node) -> None:
    """The bytes under another dtype; copied where the strides forbid it."""
    value, out = node.inputs[0], node.outputs[0]
    layout = m.layout[value]
    if m.itemsize(value) == m.itemsize(out) or layout.row:
        m.share(out, value, layouts.row_major(m.shape(out)) if layout.row else layout)
        return
    m.allocate(out)


def contiguous(m: Allocator, node: Node) -> None:
    """The array itself where it already lies in a row."""
    value, out = node.inputs[0], node.outputs[0]
    if m.layout[value].row and m.buffers[m.buffer[value]].nbytes <= m.nbytes(out) + 16384:
        m.share(out, value)
        return
    m.allocate(out)


def cast(m: Allocator, node: Node) -> None:
    """Another dtype: in place where the size stays and nothing else needs it."""
    m.copied(node.inputs[0], node.outputs[0], m.layout[node.inputs[0]].contiguous)


def filled(m: Allocator, node: Node) -> None:
    """A constant written out."""
    layout = m.layout[node.inputs[0]]
    m.copied(node.inputs[0], node.outputs[0], layout.data_size != 1 and layout.contiguous)


def updated(m: Allocator, node: Node) -> None:
    """A copy of the first input, or the input itself, that parts are written into."""
    layout = m.layout[node.inputs[0]]
    whole = layout.contiguous and layout.data_size == prod(m.shape(node.inputs[0]))
    m.copied(node.inputs[0], node.outputs[0], whole and layout.data_size != 1)


def scattered(m: Allocator, node: Node) -> None:
    """As `updated`, for the scatters."""
    m.copied(node.inputs[0], node.outputs[0], m.layout[node.inputs[0]].row)


def sorted_copy(m: Allocator, node: Node) -> None:
    """A copy sorted in place."""
    m.copied(node.inputs[0], node.outputs[0], m.layout[node.inputs[0]].contiguous)


def softmax(m: Allocator, node: Node) -> None:
    """In place where nothing else needs the input, else a copy of it."""
    value, out = node.inputs[0], node.outputs[0]
    layout = m.layout[value]
    if not (layout.contiguous and layout.strides[-1] == 1):
        m.allocate(out)
        return
    if m.donatable(value):
        m.share(out, value)
    else:
        m.allocate(out, layout)


def logsumexp(m: Allocator, node: Node) -> None:
    """A reduction over the last axis, which must be contiguous."""
    value, out = node.inputs[0], node.outputs[0]
    layout = m.layout[value]
    if not (layout.contiguous and layout.strides[-1] == 1):
        m.copy_of(value, out)
    m.allocate(out)


def concatenated(m: Allocator, node: Node) -> None:
    """One new buffer, each input copied into its part."""
    m.allocate(node.outputs[0])


def padded(m: Allocator, node: Node) -> None:
    """One new buffer, filled and then written into."""
    m.allocate(node.outputs[0])


def scanned(m: Allocator, node: Node) -> None:
    """A scan reads rows, so another layout is copied first."""
    m.rows(node.inputs[0], node.outputs[0])
    m.allocate(node.outputs[0])


#: Primitive, its effect on memory, and the file under mlx/backend that it follows.
CPU: dict[str, tuple[Effect, str]] = {
    **table(
        unary,
        "common/unary.h",
        "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh BitwiseInvert Ceil Conjugate Cos Cosh Erf ErfInv Exp Expm1 "
        "Floor Imag Log Log1p LogicalNot Negative Real Round Sigmoid Sign Sin Sinh Square Sqrt Tan Tanh ConvertFP8",
    ),
    **table(
        binary,
        "common/binary.h",
        "Add ArcTan2 BitwiseBinary Divide Equal Greater GreaterEqual Less LessEqual LogAddExp LogicalAnd LogicalOr "
        "Maximum Minimum Multiply NotEqual Power Remainder Subtract FloorDivide",
    ),
    **table(binary_two, "cpu/binary.cpp", "DivMod"),
    **table(ternary, "common/ternary.h", "Select"),
    **table(compiled, "common/compiled.cpp", "Compiled"),
    **table(same_buffer, "common/common.cpp", "Copy Depends StopGradient"),
    **table(last_inputs, "common/common.cpp", "CustomTransforms"),
    **table(reshaped, "common/common.cpp", "Reshape Flatten Unflatten"),
    **table(transposed, "common/common.cpp", "Transpose"),
    **table(broadcasted, "common/broadcasting.cpp", "Broadcast BroadcastAxes"),
    **table(sliced, "common/slicing.cpp", "Slice"),
    **table(split, "common/common.cpp", "Split"),
    **table(squeezed, "common/common.cpp", "Squeeze"),
    **table(expanded, "common/common.cpp", "ExpandDims"),
    **table(strided, "common/common.cpp", "AsStrided"),
    **table(viewed, "cpu/primitives.cpp", "View"),
    **table(contiguous, "cpu/primitives.cpp", "Contiguous"),
    **table(cast, "cpu/primitives.cpp", "AsType"),
    **table(filled, "cpu/primitives.cpp", "Full"),
    **table(updated, "cpu/indexing.cpp", "SliceUpdate DynamicSliceUpdate"),
    **table(scattered, "cpu/indexing.cpp", "Scatter ScatterAxis MaskedScatter"),
    **table(sorted_copy, "cpu/sort.cpp", "Sort Partition"),
    **table(softmax, "cpu/softmax.cpp", "Softmax"),
    **table(logsumexp, "cpu/logsumexp.cpp", "LogSumExp"),
    **table(concatenated, "cpu/primitives.cpp", "Concatenate"),
    **table(padded, "cpu/primitives.cpp", "Pad"),
    **table(scanned, "cpu/scan.cpp", "Scan"),
    **table(matmul, "cpu/matmul.cpp", "Matmul"),
    **table(addmm, "cpu/matmul.cpp", "AddMM"),
    **table(matmul, "cpu/masked_mm.cpp", "GatherMM SegmentedMM BlockMaskedMM"),
    **table(quantized_matmul, "cpu/quantized.cpp", "QuantizedMatmul Quantize"),
    **table(gather_quantized_matmul, "cpu/quantized.cpp", "GatherQMM"),
    **table(convolution, "cpu/conv.cpp", "Convolution"),
    **table(
        fresh,
        "cpu/primitives.cpp, cpu/reduce.cpp, cpu/arg_reduce.cpp, cpu/indexing.cpp, cpu/sort.cpp, cpu/fft.cpp",
        "Arange ArgPartition ArgReduce ArgSort DynamicSlice FFT Gather GatherAxis Hadamard NumberOfElements RandomBits "
        "Reduce SearchSorted",
    ),
}
