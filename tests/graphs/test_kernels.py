"""Functions of `mx.fast` as the kernels that a GPU has for them, traced on any machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune as mt
from mlx_tune.graphs import ArraySpec
from mlx_tune.graphs.backends import rules_of
from mlx_tune.graphs.graph import Graph
from mlx_tune.graphs.tracing.trace import trace_step

X = ArraySpec((4, 256, 64), mx.bfloat16)
W = ArraySpec((64,), mx.bfloat16)
HEADS = ArraySpec((2, 8, 256, 64), mx.bfloat16)
SHARED = ArraySpec((2, 2, 256, 64), mx.bfloat16)


def attend(q: mx.array, k: mx.array, v: mx.array, mask: str | mx.array | None = "causal") -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, mask=mask)


def traced(step: Callable[..., object], *args: ArraySpec, backend: str = "cuda") -> Graph:
    return trace_step(step, args, rules=rules_of(backend))


def names(graph: Graph) -> Counter[str]:
    """Its operations, without those that only look at an array."""
    return Counter(node.name for node in graph.nodes if node.name not in ("Broadcast", "StopGradient", "Copy"))


def gradient(function: Callable[..., mx.array], count: int) -> Callable[..., object]:
    def step(*args: mx.array) -> object:
        return mx.vjp(function, list(args[:-1]), [args[-1]])[1][:count]

    return step


@pytest.mark.parametrize(
    ("function", "args", "kernels"),
    [
        (lambda x, w: mx.fast.rms_norm(x, w, 1e-5), [X, W, X], {"RMSNormVJP"}),
        (lambda x, w: mx.fast.layer_norm(x, w, w, 1e-5), [X, W, X], {"LayerNormVJP", "Add"}),
        (lambda x: mx.fast.layer_norm(x, None, None, 1e-5), [X, X], {"LayerNormVJP"}),
        (lambda x: mx.fast.rms_norm(x, None, 1e-5), [X, X], {"RMSNormVJP"}),
        (lambda x: mx.fast.rope(x, 64, traditional=False, base=1e4, scale=1.0, offset=0), [HEADS, HEADS], {"RoPE"}),
        (attend, [HEADS, SHARED, SHARED, HEADS], {"ScaledDotProductAttention", "ScaledDotProductAttentionVJP"}),
    ],
)
def test_a_gradient_is_a_kernel_and_what_it_needs(
    function: Callable[..., mx.array], args: list[ArraySpec], kernels: set[str]
) -> None:
    graph = traced(gradient(function, len(args) - 1), *args)
    assert names(graph) == Counter(kernels)
    # It reads the arrays themselves, the cotangent last, and every gradient is the shape of what it is of.
    last = next(node for node in graph.nodes if node.name.endswith("VJP") or node.name == "RoPE")
    read = [graph.values[v].label for v in last.inputs if graph.values[v].role == "batch"]
    assert read[-1 if "RoPE" not in kernels else 0] == f"args[{len(args) - 1}]"
    assert [graph.values[v].shape for v in graph.outputs] == [tuple(x.shape) for x in args[:-1]]


def test_forward_and_backward_are_joined_by_what_the_backward_kernel_reads() -> None:
    graph = traced(gradient(attend, 3), HEADS, SHARED, SHARED, HEADS)
    forward, backward = graph.nodes[-2:]  # before them copies that `mx.vjp` makes, other names of the inputs
    assert backward.inputs == (*forward.inputs, *forward.outputs, backward.inputs[-1])
    assert [graph.values[v].shape for v in forward.outputs] == [(2, 8, 256, 64), (2, 8, 256, 1)]


def test_without_a_gradient_no_log_sum_exp_is_made() -> None:
    graph = traced(lambda *args: attend(*args), HEADS, SHARED, SHARED)
    assert [(node.name, len(node.outputs)) for node in graph.nodes] == [("ScaledDotProductAttention", 1)]


@pytest.mark.parametrize(
    ("q", "backend", "fused"),
    [
        (HEADS, "cuda", True),
        (ArraySpec((2, 8, 250, 64), mx.bfloat16), "cuda", False),  # not in whole tiles
        (ArraySpec((2, 8, 256, 64), mx.float32), "cuda", False),
        (ArraySpec((2, 8, 256, 256), mx.bfloat16), "cuda", False),
        (HEADS, "metal", True),
        (ArraySpec((2, 8, 256, 256), mx.bfloat16), "metal", True),
        (ArraySpec((2, 8, 256, 48), mx.bfloat16), "metal", False),
        (HEADS, "cpu", False),
    ],
)
def test_attention_is_fused_in_training_for_shapes_that_the_backend_has(
    q: ArraySpec, backend: str, fused: bool
) -> None:
    kv = ArraySpec((2, 2, *q.shape[2:]), q.dtype)
    operations = names(traced(gradient(attend, 3), q, kv, kv, q, backend=backend))
    assert ("ScaledDotProductAttentionVJP" in operations) == fused
    assert ("Softmax" in operations) == (not fused)


def test_an_array_as_mask_makes_metal_hold_the_scores_in_training() -> None:
    mask = ArraySpec((256, 256), mx.bool_)

    def step(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> list[mx.array]:
        return list(mx.grad(lambda q, k, v: attend(q, k, v, mask).sum(), argnums=(0, 1, 2))(q, k, v))

    assert "Softmax" in names(traced(step, HEADS, SHARED, SHARED, mask, backend="metal"))
    cuda = names(traced(step, HEADS, SHARED, SHARED, mask))
    assert cuda["ScaledDotProductAttentionVJP"] == 1
    assert "Softmax" not in cuda


@pytest.mark.parametrize("dtype", [mx.bool_, mx.bfloat16], ids=str)
def test_cuda_makes_an_additive_mask_of_the_scores_shape_where_it_is_given_true_and_false(dtype: mx.Dtype) -> None:
    q, kv, mask = (
        ArraySpec((4, 32, 512, 128), mx.bfloat16),
        ArraySpec((4, 8, 2048, 128), mx.bfloat16),
        ArraySpec((4, 1, 512, 2048), dtype),
    )
    floors = {
        backend: mt.estimate_memory(attend, q, kv, kv, mask, backend=backend) for backend in ("cuda", "metal", "cpu")
    }
    scores, out = 4 * 32 * 512 * 2048 * 2, q.nbytes
    besides = {name: found.floor_bytes - found.start_bytes - out for name, found in floors.items()}
    assert besides["metal"] < out
    assert besides["cpu"] >= scores  # unfused
    if dtype == mx.bool_:  # zeros and minus infinities; the mask takes the place of one of them
        assert besides["cuda"] == pytest.approx(2 * scores, abs=2 * out)
    else:
        assert besides["cuda"] < out


def test_the_loss_of_mlx_nn_is_the_kernel_that_it_takes_on_a_gpu() -> None:
    logits, targets = ArraySpec((512, 1000), mx.float32), ArraySpec((512,), mx.int32)

    def step(logits: mx.array, targets: mx.array) -> object:
        return mx.value_and_grad(lambda x: nn.losses.cross_entropy(x, targets, reduction="mean"))(logits)

    for backend in ("cuda", "metal"):
        operations = names(traced(step, logits, targets, backend=backend))
        assert operations["CrossEntropy"] == operations["CrossEntropyVJP"] == 1
        # The logits are the step's own: their gradient is the only other array of that size.
        assert mt.estimate_memory(step, logits, targets, backend=backend).floor_bytes < 2.02 * logits.nbytes
    assert "LogSumExp" in names(traced(step, logits, targets, backend="cpu"))


def test_streams_and_devices_are_the_caller_s_own_again() -> None:
    before = mx.default_device(), mx.fast.rms_norm, mx.fast.rope

    def step(x: mx.array, w: mx.array) -> mx.array:
        assert mx.default_device() == mx.Device(mx.cpu)  # a stream of it can be asked for
        return mx.fast.rms_norm(x, w, 1e-5, stream=mx.cpu)

    assert names(traced(step, X, W)) == Counter(["RMSNorm"])
    assert (mx.default_device(), mx.fast.rms_norm, mx.fast.rope) == before


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down(nn.silu(self.up(self.norm(x))))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpointed_block_has_its_kernels_twice(compiled: bool) -> None:
    model = nn.Sequential(Block(), Block())
    mx.eval(model.parameters())

    def counts() -> Counter[str]:
        grad = nn.value_and_grad(model, lambda model, x: model(x).square().mean())

        def step(x: mx.array) -> object:
            return grad(model, x)

        taken = mx.compile(step, inputs=model.state) if compiled else step
        return names(trace_step(taken, [ArraySpec((4, 64), mx.float32)], model, rules=rules_of("cuda")))

    plain = counts()
    assert (plain["RMSNorm"], plain["RMSNormVJP"]) == (2, 2)
    with mt.checkpoint_blocks(model):
        again = counts()
    assert (again["RMSNorm"], again["RMSNormVJP"]) == (4, 2)
    # Two blocks, the input of each, and the gradients of the second one's input and of the linear layers' weights.
    assert again["CustomTransforms"] == 2 + 2 + 1 + 2 * 4
    assert plain["CustomTransforms"] == 0
