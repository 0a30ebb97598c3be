"""Operations that are one kernel on a GPU, in a trace that any machine can take.

On a CPU MLX builds the functions of `mx.fast` from other operations, and on a GPU its exporter refuses some of them. A
traced step therefore calls these instead: each makes an array of the right shape that waits for its inputs, with a
number that says which primitive belongs there, and `fold_kernels` puts that in its place. Which shapes a backend has a
kernel for is decided as its source does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_tune.graphs.arguments import ArraySpec
from mlx_tune.graphs.backends import (
    CUDNN_TILE,
    CUDNN_WIDEST,
    CUDNN_WIDTHS_OF,
    METAL_ATTENTION_VJP_WIDTHS,
    METAL_ATTENTION_WIDTHS,
)
from mlx_tune.graphs.graph import Graph, Node
from mlx_tune.graphs.tracing.custom_gradients import Marks, called_with_gradient
from mlx_tune.graphs.tracing.replaced_calls import ReplacedCalls

#: The place of a kernel's output among the ends of calls.
KERNEL = "kernel"


def kernel(marks: Marks, primitive: str, inputs: Sequence[mx.array], *like: ArraySpec | mx.array) -> list[mx.array]:
    """Arrays that stand for what a primitive makes of its inputs.

    Args:
        marks: The marks of the trace.
        primitive: The primitive's name.
        inputs: The arrays that it reads.
        *like: Arrays or descriptions that its outputs are like.
    """
    made = [mx.full(x.shape, marks.new(KERNEL, i, x, primitive).astype(x.dtype)) for i, x in enumerate(like)]
    return list(mx.depends(made, [mx.stop_gradient(x) for x in inputs]))


def fold_kernels(graph: Graph) -> set[int]:
    """Put primitives in the places that marks keep for them.

    Args:
        graph: The traced step, as it was built; changed in place.

    Returns:
        The values that they make.
    """
    places = {value: mark for value, mark in graph.marks.items() if mark.end == KERNEL}
    if not places:
        return set()
    readers: dict[int, list[int]] = {}
    stopped: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        for value in node.inputs:
            readers.setdefault(value, []).append(i)
        if node.name == "StopGradient":
            stopped[node.outputs[0]] = node.inputs[0]
    as_traced, made = list(graph.nodes), set[int]()
    for value, mark in places.items():
        del graph.marks[value]
        while value in readers and as_traced[readers[value][0]].name != "Depends":
            value = as_traced[readers[value][0]].outputs[0]
        for i in readers.get(value, []):
            node = as_traced[i]
            inputs = tuple(stopped.get(v, v) for v in node.inputs[len(node.outputs) :])
            graph.nodes[i] = Node(mark.primitive, inputs, node.outputs)
            made.update(node.outputs)
    return made


def unwrap_kernels(graph: Graph, made: set[int]) -> None:
    """Let what kernels make be read as it is: a primitive that knows its gradient needs no other around it.

    Args:
        graph: The step with its custom gradients folded; changed in place.
        made: The values that kernels make.
    """
    if not made:
        return
    behind = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.name == "StopGradient"}
    itself: dict[int, int] = {}
    for node in graph.nodes:
        if node.name == "CustomTransforms":
            passed = [behind.get(v, v) for v in node.inputs[len(node.inputs) - len(node.outputs) :]]
            if made.issuperset(passed):
                itself |= zip(node.outputs, passed, strict=True)
    graph.rename(itself)
    graph.drop_unneeded()


def _with_vjp(marks: Marks, primitive: str, inputs: Sequence[mx.array], smooth: int, like: ArraySpec) -> mx.array:
    """A kernel whose gradient is another, named after it, which reads the inputs and the cotangent."""

    def gradient(_: object, cotangent: mx.array, __: object) -> list[mx.array]:
        return kernel(marks, f"{primitive}VJP", [*inputs, cotangent], *inputs[:smooth])

    def forward(*_: mx.array) -> mx.array:
        return kernel(marks, primitive, inputs, like)[0]

    y: mx.array = called_with_gradient(forward, gradient, tuple(inputs[:smooth]), {}, marks)
    return y


def rms_norm(
    _: Callable[..., Any], replaced: ReplacedCalls, x: mx.array, weight: mx.array | None, eps: float, **__: Any
) -> mx.array:
    """One kernel, and one for both gradients."""
    dtype = x.dtype if weight is None else mx.result_type(x, weight)
    weight = mx.array(1, dtype) if weight is None else weight.astype(dtype)
    return _with_vjp(replaced.marks, "RMSNorm", [x.astype(dtype), weight], 2, ArraySpec(x.shape, dtype))


def layer_norm(
    _: Callable[..., Any],
    replaced: ReplacedCalls,
    x: mx.array,
    weight: mx.array | None,
    bias: mx.array | None,
    eps: float,
    **__: Any,
) -> mx.array:
    """One kernel, and one for the three gradients."""
    given = [array for array in (x, weight, bias) if array is not None]
    dtype = mx.result_type(*given)
    inputs = [x.astype(dtype), *(mx.array(1, dtype) if a is None else a.astype(dtype) for a in (weight, bias))]
    return _with_vjp(replaced.marks, "LayerNorm", inputs, 3, ArraySpec(x.shape, dtype))


def rope(
    _: Callable[..., Any],
    replaced: ReplacedCalls,
    a: mx.array,
    dims: int,
    *,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    **__: Any,
) -> mx.array:
    """One kernel, which turns the other way for the gradient."""
    offset = offset if isinstance(offset, mx.array) else mx.array(offset, mx.int32)
    others = [offset, *([] if freqs is None else [freqs.astype(mx.float32)])]

    def gradient(before: object, cotangent: mx.array, outputs: object) -> list[mx.array]:
        return kernel(marks, "RoPE", [cotangent, *others], a)

    def forward(a: mx.array) -> mx.array:
        return kernel(marks, "RoPE", [a, *others], a)[0]

    marks = replaced.marks
    y: mx.array = called_with_gradient(forward, gradient, (a,), {}, marks)
    return y


def cross_entropy(
    _: Callable[..., Any], replaced: ReplacedCalls, logits: mx.array, targets: mx.array, **__: Any
) -> mx.array:
    """One kernel for the loss of each row in float32, and one for the logits' gradient."""
    marks = replaced.marks
    targets = targets.astype(mx.int32)
    made: list[mx.array] = []

    def forward(logits: mx.array) -> mx.array:
        made[:] = kernel(marks, "CrossEntropy", [logits, targets], ArraySpec(targets.shape, mx.float32))
        return made[0]

    def gradient(before: object, cotangent: mx.array, outputs: object) -> list[mx.array]:
        return kernel(marks, "CrossEntropyVJP", [logits, targets, made[0], cotangent], logits)

    y: mx.array = called_with_gradient(forward, gradient, (logits,), {}, marks)
    return y


def attention(
    original: Callable[..., mx.array],
    replaced: ReplacedCalls,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    **others: Any,
) -> mx.array:
    """Attention by one kernel and gradients by another where the backend has them for these shapes; else unfused."""

    def unfused(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return original(q, k, v, scale=scale, mask=mask, sinks=sinks, **others)

    marks, training = replaced.marks, replaced.gradients > 0
    dtype = mx.result_type(q, k, v)
    has_kernels = _cuda_attention if replaced.backend == "cuda" else _metal_attention
    forward, backward = has_kernels(q, k, v, mask, dtype, training)
    if not forward:
        return unfused(q, k, v)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    besides: list[mx.array] = []
    if isinstance(mask, mx.array):
        besides.append(mx.broadcast_to(mask, (*q.shape[:-1], k.shape[-2])))
        if mask.dtype == mx.bool_ and replaced.backend == "cuda":
            # cuDNN adds masks. MLX makes one of the scores' shape, by `supports_bool_mask` in fast.cpp.
            shape = besides[0].shape
            besides[0] = mx.where(besides[0], mx.full(shape, 0, dtype), mx.full(shape, -mx.inf, dtype))
    if sinks is not None:
        besides.append(sinks.astype(dtype))
    made: list[mx.array] = []
    out = ArraySpec((*q.shape[:-1], v.shape[-1]), dtype)
    rows = [ArraySpec((*q.shape[:-1], 1), mx.float32)] if training and backward else []

    def fused(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        made[:] = kernel(marks, "ScaledDotProductAttention", [q, k, v, *besides], out, *rows)
        return made[0]

    def gradient(before: tuple[mx.array, ...], cotangent: mx.array, outputs: object) -> list[mx.array]:
        if not backward:
            return list(mx.vjp(lambda *primals: [unfused(*primals)], [q, k, v], [cotangent])[1])
        return kernel(marks, "ScaledDotProductAttentionVJP", [q, k, v, *besides, *made, cotangent], q, k, v)

    y: mx.array = called_with_gradient(fused, gradient, (q, k, v), {}, marks)
    return y


def _cuda_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: object, dtype: mx.Dtype, training: bool
) -> tuple[bool, bool]:
    """`supports_sdpa_cudnn` and the two `use_fallback` in cuda/scaled_dot_product_attention.cpp."""
    widths = (q.shape[-1], v.shape[-1])
    fits = all(width % CUDNN_WIDTHS_OF == 0 and width <= CUDNN_WIDEST for width in widths)
    too_long = mask == "causal" if isinstance(mask, str) else False
    forward = (
        fits and dtype in (mx.float16, mx.bfloat16) and q.shape[2] > 1 and not (too_long and q.shape[2] > k.shape[2])
    )
    return forward, q.shape[2] % CUDNN_TILE == 0


def _metal_attention(
    q: mx.array, k: mx.array, v: mx.array, mask: object, dtype: mx.Dtype, training: bool
) -> tuple[bool, bool]:
    """`use_fallback` in metal/scaled_dot_product_attention.cpp; the backward kernels of the wheel."""
    width = q.shape[-1]
    same = width == v.shape[-1]
    if training:
        both = same and width in METAL_ATTENTION_VJP_WIDTHS and not isinstance(mask, mx.array)
        return both, both
    return same and width in METAL_ATTENTION_WIDTHS, False


#: What stands in for the functions of `mx.fast` that are kernels somewhere.
KERNELS: dict[str, Callable[..., object]] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "rope": rope,
    "cross_entropy": cross_entropy,
    "scaled_dot_product_attention": attention,
}
