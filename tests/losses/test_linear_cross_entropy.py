"""The loss from hidden states: its value and every gradient against the plain loss and NumPy, and its memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arithmetic import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

import mlx_tune as mt
from mlx_tune.errors import InvalidArgumentError, TraceError
from mlx_tune.losses.linear_cross_entropy import linear_cross_entropy, linear_log_probs

WIDTH, VOCABULARY = 64, 96


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def adapted(layer: nn.Module) -> nn.Module:
    """Adapters that are not at their beginning, where half of their gradients are zero."""
    layer.lora_b = 0.1 * normal(*layer.lora_b.shape, seed=3)
    layer.lora_a = 0.1 * normal(*layer.lora_a.shape, seed=4)
    return layer


def frozen(layer: nn.Module) -> nn.Module:
    layer.freeze()
    return layer


def base_frozen(layer: nn.Module) -> nn.Module:
    """As mlx-lm trains adapters."""
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    return layer


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, VOCABULARY, bias=bias)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "without bias": lambda: linear(False),
    "frozen": lambda: frozen(linear()),
    "quantized": lambda: nn.QuantizedLinear.from_linear(linear(), 32, 4),
    "embedding": lambda: nn.Embedding(VOCABULARY, WIDTH),
    "quantized embedding": lambda: nn.QuantizedEmbedding.from_embedding(nn.Embedding(VOCABULARY, WIDTH), 32, 4),
    "lora": lambda: base_frozen(adapted(LoRALinear.from_base(linear(), r=4))),
    "lora on quantized": lambda: base_frozen(
        adapted(LoRALinear.from_base(nn.QuantizedLinear.from_linear(linear(False), 32, 4), r=4))
    ),
    "dora": lambda: base_frozen(adapted(DoRALinear.from_base(linear(), r=4))),
    "lora embedding": lambda: base_frozen(adapted(LoRAEmbedding.from_base(nn.Embedding(VOCABULARY, WIDTH), r=4))),
    "dora embedding": lambda: base_frozen(adapted(DoRAEmbedding.from_base(nn.Embedding(VOCABULARY, WIDTH), r=4))),
}


def made(kind: str) -> nn.Module:
    mx.random.seed(0)
    return HEADS[kind]()


def logits_of(head: nn.Module | mx.array, hidden: mx.array) -> mx.array:
    if isinstance(head, mx.array):
        return hidden @ head.T
    return head.as_linear(hidden) if hasattr(head, "as_linear") else head(hidden)


def plain(
    hidden, head, targets, *, weights=None, softcap=None, scale=None, label_smoothing=0.0, reduction="mean"
) -> mx.array:
    """The loss that holds all logits."""
    logits = logits_of(head, hidden).astype(mx.float32)
    logits = logits if scale is None else logits * scale
    logits = logits if softcap is None else softcap * mx.tanh(logits / softcap)
    return nn.losses.cross_entropy(
        logits, targets, weights=weights, label_smoothing=label_smoothing, reduction=reduction
    )


def close(found: mx.array, expected: mx.array, tolerance: float) -> None:
    a, b = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (found, expected))
    assert a.shape == b.shape
    tolerance = rounding(tolerance)
    assert np.abs(a - b).max() <= tolerance * max(1e-30, np.abs(b).max()), np.abs(a - b).max() / np.abs(b).max()


def every_gradient(loss, head: nn.Module, hidden: mx.array, weights: mx.array | None) -> dict[str, mx.array]:
    """The value, and the gradients of the head's trained arrays, the states and the weights."""
    given_weights = weights is not None

    def of_head(head: nn.Module) -> mx.array:
        return loss(hidden, head, weights).sum()

    found = {"value": loss(hidden, head, weights)}
    if tree_flatten(head.trainable_parameters()):
        found |= dict(tree_flatten(nn.value_and_grad(head, of_head)(head)[1]))
    found["hidden"] = mx.grad(lambda hidden: loss(hidden, head, weights).sum())(hidden)
    if given_weights:
        found["weights"] = mx.grad(lambda weights: loss(hidden, head, weights).sum())(weights)
    return found


@pytest.mark.parametrize("options", [
    {}, {"scale": 0.3, "softcap": 2.0}, {"label_smoothing": 0.1},
    {"softcap": 5.0, "label_smoothing": 0.2, "scale": 3.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", HEADS)
def test_value_and_every_gradient_are_those_of_the_plain_loss(kind, reduction, weighted, options):
    head, hidden = made(kind), normal(2, 11, WIDTH, seed=1)
    targets = mx.random.randint(0, VOCABULARY, (2, 11), key=mx.random.key(2))
    weights = mx.random.uniform(shape=(2, 11), key=mx.random.key(5)) if weighted else None
    factors = normal(2, 11, seed=6) if reduction == "none" else mx.array(1.7)

    def ours(hidden, head, weights):
        return factors * linear_cross_entropy(
            hidden, head, targets, weights=weights, reduction=reduction, chunk_tokens=4, **options
        )

    def theirs(hidden, head, weights):
        return factors * plain(hidden, head, targets, weights=weights, reduction=reduction, **options)

    found, expected = (every_gradient(loss, head, hidden, weights) for loss in (ours, theirs))
    assert found.keys() == expected.keys()
    for name in expected:
        close(found[name], expected[name], 2e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_alone_is_a_head(training):
    head, hidden = normal(VOCABULARY, WIDTH), normal(9, WIDTH, seed=1)
    targets = mx.arange(9)
    for argument in (0, 1):
        found, expected = (
            mx.grad(loss, argument)(hidden, head, targets)
            for loss in (lambda *a: linear_cross_entropy(*a, chunk_tokens=2), plain)
        )
        close(found, expected, 2e-6)


def test_a_head_in_evaluation_mode_gives_the_same_and_computes_the_loss_alone():
    head, hidden, targets = linear(), normal(64, WIDTH, seed=1), mx.arange(64)
    expected = every_gradient(lambda h, head, _: plain(h, head, targets), head, hidden, None)
    head.eval()
    found = every_gradient(
        lambda h, head, _: linear_cross_entropy(h, head, targets, chunk_tokens=7), head, hidden, None
    )
    for name in expected:
        close(found[name], expected[name], 2e-6)

    def products(training: bool) -> int:
        head.train(training)
        operations = mt.estimate_memory(
            lambda h: linear_cross_entropy(h, head, targets, chunk_tokens=16), hidden
        ).operations
        return sum(name in ("Matmul", "AddMM") for name in operations)

    assert products(False) == 4  # one for each chunk


def reference(hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean loss and its gradients, written out in float64."""
    logits = hidden @ weight.T
    logits -= logits.max(1, keepdims=True)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    n = len(targets)
    loss = -np.log(chances[np.arange(n), targets]).mean()
    chances[np.arange(n), targets] -= 1
    return loss, chances @ weight / n, chances.T @ hidden / n


@settings(max_examples=40)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 130), st.integers(1, 25), st.integers(0, 10**6))
def test_any_shape_against_float64(tokens, width, vocabulary, chunk, seed):
    hidden, weight = normal(tokens, width, seed=seed), normal(vocabulary, width, seed=seed + 1)
    targets = mx.random.randint(0, vocabulary, (tokens,), key=mx.random.key(seed + 2))
    loss, (of_hidden, of_weight) = mx.value_and_grad(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_tokens=chunk), (0, 1)
    )(hidden, weight)
    expected = reference(*(np.array(x, dtype=np.float64) for x in (hidden, weight)), np.array(targets))
    for found, right in zip((loss, of_hidden, of_weight), expected, strict=True):
        np.testing.assert_allclose(np.array(found), right, rtol=rounding(2e-5), atol=rounding(2e-6))


@pytest.mark.parametrize("kind", ["linear", "frozen", "embedding", "lora"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_no_further_from_float32_than_the_plain_loss(kind, dtype):
    head = made(kind)
    hidden, targets = normal(200, WIDTH, seed=1), mx.random.randint(0, VOCABULARY, (200,), key=mx.random.key(2))
    head.set_dtype(dtype)
    hidden = hidden.astype(dtype)
    wide = made(kind)
    wide.load_weights([(name, a.astype(mx.float32)) for name, a in tree_flatten(head.parameters())])
    truth = every_gradient(lambda h, head, _: plain(h, head, targets), wide, hidden.astype(mx.float32), None)
    ours = every_gradient(
        lambda h, head, _: linear_cross_entropy(h, head, targets, chunk_tokens=32), head, hidden, None
    )
    theirs = every_gradient(lambda h, head, _: plain(h, head, targets), head, hidden, None)
    for name, right in truth.items():
        assert ours[name].dtype == theirs[name].dtype
        errors = [mx.linalg.norm(x[name].astype(mx.float32) - right).item() for x in (ours, theirs)]
        assert errors[0] <= 1.05 * errors[1] + rounding(1e-6) * mx.linalg.norm(right).item(), (name, errors)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_trains_compiled_and_inside_a_checkpoint(compiled, checkpointed):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.block = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

        def __call__(self, x):
            return mx.tanh(self.block(self.table(x)))

    def gradients(loss):
        mx.random.seed(1)
        model = Model()
        x = mx.random.randint(0, VOCABULARY, (3, 8), key=mx.random.key(3))
        if checkpointed:
            mt.checkpoint(model.block)
        grad = nn.value_and_grad(model, lambda model, x: loss(model(x[:, :-1]), model.table, x[:, 1:]))
        call = mx.compile(lambda x: grad(model, x), inputs=model.state) if compiled else (lambda x: grad(model, x))
        value, made = call(x)
        return {"value": value} | dict(tree_flatten(made))

    found = gradients(lambda *a: linear_cross_entropy(*a, chunk_tokens=5))
    expected = gradients(plain)
    for name in expected:  # the table is looked up as well: both its gradients count
        close(found[name], expected[name], 3e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dropout_in_a_head_is_drawn_once_for_value_and_gradient(reduction):
    """A finite difference along the gradient tells whether loss and gradient saw the same dropout."""
    head = LoRALinear.from_base(linear(False), r=4, dropout=0.5, scale=1.0)
    head = base_frozen(adapted(head))
    hidden, targets = normal(12, WIDTH, seed=1), mx.arange(12)

    def loss(a: mx.array) -> mx.array:
        head.lora_a = a
        mx.random.seed(7)
        return linear_cross_entropy(hidden, head, targets, reduction=reduction, chunk_tokens=5).sum()

    a = head.lora_a
    value, gradient = mx.value_and_grad(loss)(a)
    step = 1e-2 / mx.linalg.norm(gradient).item()
    change = loss(a + step * gradient) - loss(a - step * gradient)
    assert change.item() == pytest.approx(2 * step * mx.square(gradient).sum().item(), rel=2e-2)
    assert value.item() == pytest.approx(loss(a).item(), rel=rounding(1e-6))


def test_the_random_stream_goes_on_as_if_drawn_once():
    head, hidden = linear(), normal(4, WIDTH)
    mx.random.seed(3)
    mx.eval(mx.grad(lambda h: linear_cross_entropy(h, head, mx.arange(4)))(hidden))
    after = mx.random.uniform(shape=(3,))
    mx.random.seed(3)
    assert mx.array_equal(after, mx.random.uniform(shape=(3,))).item()


def test_dropout_in_one_chunk_is_that_of_the_plain_loss():
    """One key is drawn, and no other for finding out the vocabulary."""
    head = base_frozen(adapted(LoRALinear.from_base(linear(False), r=4, dropout=0.5)))
    hidden, targets, found = normal(12, WIDTH, seed=1), mx.arange(12), []
    for loss in (linear_cross_entropy, plain):
        mx.random.seed(7)
        found.append((loss(hidden, head, targets), mx.random.uniform(shape=(3,))))
    (ours, after), (theirs, expected) = found
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert mx.array_equal(after, expected).item()


def test_large_and_infinite_logits_are_what_the_plain_loss_makes_of_them():
    weight = normal(7, 4)
    weight[2] = -math.inf
    hidden = mx.abs(normal(6, 4, seed=1)) * mx.array([1, 1e4, 1e30, 1, 1, 0.0])[:, None]
    targets = mx.array([0, 1, 3, 2, 6, 5])
    found, expected = (
        loss(hidden, weight, targets, reduction="none")
        for loss in (lambda *a, **k: linear_cross_entropy(*a, chunk_tokens=4, **k), plain)
    )
    assert mx.allclose(found, expected, rtol=rounding(1e-6), equal_nan=True).item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_zero_leave_no_gradient(reduction):
    head, hidden = linear(), normal(5, WIDTH)
    found = every_gradient(
        lambda h, head, w: linear_cross_entropy(h, head, mx.arange(5), weights=w, reduction=reduction, chunk_tokens=2),
        head, hidden, mx.zeros((5,)),
    )  # fmt: skip
    assert all((found[name] == 0).all().item() for name in found if name != "weights")


@pytest.mark.parametrize("target", [pytest.param(-100, marks=pytest.mark.cpu_only), -1, VOCABULARY - 1])
def test_targets_below_zero_are_what_the_plain_loss_makes_of_them(target):
    head, hidden, targets = linear(), normal(3, WIDTH), mx.array([1, target, 2])
    close(linear_cross_entropy(hidden, head, targets, chunk_tokens=2), plain(hidden, head, targets), 1e-6)


def test_log_probabilities_are_those_of_a_softmax():
    head, hidden, targets = linear(), normal(2, 5, WIDTH), mx.arange(10).reshape(2, 5)
    logits = head(hidden)
    expected = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), targets[..., None], -1)[..., 0]
    close(linear_log_probs(hidden, head, targets, chunk_tokens=3), expected, 1e-6)


@pytest.mark.parametrize("kind", ["linear", "frozen", "embedding"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_more_than_one_chunk_of_logits_is_ever_there(kind, compiled, reduction):
    """By the step's graph: the floor holds a few arrays of one chunk, and no array of all tokens.

    As a processor runs it: GPUs hold, besides, all that one command buffer touches, which is the whole of a toy.
    """
    tokens, chunk, vocabulary = 512, 32, 4096
    mx.random.seed(0)
    head = nn.Embedding(vocabulary, 16) if kind == "embedding" else nn.Linear(16, vocabulary, bias=False)
    head = frozen(head) if kind == "frozen" else head
    targets = mx.arange(tokens)

    def peak(loss) -> int:
        grad = nn.value_and_grad(head, lambda head, h: loss(h, head, targets).sum())
        argument = mx.grad(lambda h: loss(h, head, targets).sum())
        step = argument if kind == "frozen" else functools.partial(grad, head)
        step = mx.compile(step) if compiled else step
        estimate = mt.estimate_memory(step, mt.ArraySpec((tokens, 16), mx.float32), state=head, backend="cpu")
        assert loss is plain or max(o.nbytes for o in estimate.peak_owners) < 4 * tokens * vocabulary
        return estimate.floor_bytes - estimate.start_bytes

    ours = peak(lambda *a: linear_cross_entropy(*a, reduction=reduction, chunk_tokens=chunk))
    logits, table = 4 * chunk * vocabulary, 4 * 16 * vocabulary
    assert ours <= 5 * logits + 6 * table
    assert peak(plain) >= 4 * tokens * vocabulary


@pytest.mark.parametrize(("backend", "chunks"), [("cuda", 17), ("metal", 5)])
def test_on_a_gpu_no_copy_of_a_chunks_logits_in_float32_is_made(backend, chunks):
    """The fused kernel of MLX takes half precision: logits and their gradient are all that a chunk holds.

    On CUDA all of them, until the one command buffer of so small a step has run.
    """
    tokens, vocabulary, width = 2048, 50_000, 64
    head = nn.Linear(width, vocabulary, bias=False).freeze()
    head.set_dtype(mx.bfloat16)
    targets = mx.zeros((tokens,), mx.int32)
    step = mx.compile(mx.value_and_grad(lambda h: linear_cross_entropy(h, head, targets, chunk_tokens=256)))
    hidden = mt.ArraySpec((tokens, width), mx.bfloat16)
    found = mt.estimate_memory(step, hidden, state=head, backend=backend)
    assert found.operations.count("CrossEntropy") == 8
    assert found.floor_bytes - found.start_bytes < chunks * 2 * 256 * vocabulary


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_fused_kernels_loss_is_the_same(monkeypatch, dtype):
    """As on a GPU; on a CPU MLX computes it in the dtype of the logits."""
    head, hidden, targets = linear().freeze(), normal(21, WIDTH), mx.arange(21)
    head.set_dtype(dtype)
    hidden = hidden.astype(dtype)
    expected, gradient = mx.value_and_grad(lambda h: plain(h, head, targets))(hidden)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    with monkeypatch.context() as patch:
        calls = []
        fused = mx.fast.cross_entropy
        patch.setattr(mx.fast, "cross_entropy", lambda *a: calls.append(a[0].dtype) or fused(*a))
        found, made = mx.value_and_grad(lambda h: linear_cross_entropy(h, head, targets, chunk_tokens=8))(hidden)
    assert dtype in calls
    close(found, expected, 1e-6 if dtype == mx.float32 else 2e-2)
    close(made, gradient, 3e-6 if dtype == mx.float32 else 5e-2)


@pytest.mark.parametrize(("backend", "command_buffer"), [("cpu", 0), ("cuda", 1100 << 20)])
def test_the_default_chunk_keeps_logits_small_and_products_large(backend, command_buffer):
    head, targets = nn.Linear(16, 50_000, bias=False), mx.zeros((4096,), dtype=mx.int32)
    estimate = mt.estimate_memory(
        lambda h: mx.grad(lambda h: linear_cross_entropy(h, head, targets))(h),
        mt.ArraySpec((4096, 16), mx.float32),
        state=head,
        backend=backend,
    )
    assert estimate.floor_bytes - estimate.start_bytes < 5 * (128 << 20) + command_buffer
    assert sum(name == "Matmul" for name in estimate.operations) < 40


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((mx.zeros((3, 4)), mx.zeros((9, 4)), mx.zeros((2,), mx.int32)), {}, r"hidden \[3, 4\] and targets \[2\]"),
        ((mx.zeros((0, 4)), mx.zeros((9, 4)), mx.zeros((0,), mx.int32)), {}, "hold no tokens"),
        ((mx.zeros((3, 4)), mx.zeros((9, 5)), mx.zeros((3,), mx.int32)), {}, r"width of 4, which array \[9, 5\]"),
        ((mx.zeros((3, 4)), nn.Linear(5, 9), mx.zeros((3,), mx.int32)), {}, "width of 4, which Linear does not"),
        ((mx.zeros((3, 4)), len, mx.zeros((3,), mx.int32)), {}, "pass the layer that makes the logits"),
        ((mx.zeros((3, 4)), mx.zeros((9, 4)), mx.zeros((3,))), {}, "index of each token's target"),
        ((mx.zeros((3, 4)), mx.zeros((9, 4)), mx.zeros((3,), mx.int32)), {"reduction": "max"}, "'mean', 'sum' and"),
        ((mx.zeros((3, 4)), mx.zeros((9, 4)), mx.zeros((3,), mx.int32)), {"label_smoothing": 1.0}, "from 0 up to 1"),
        ((mx.zeros((3, 4)), mx.zeros((9, 4)), mx.zeros((3,), mx.int32)), {"chunk_tokens": 0}, "chunk_tokens=0"),
        ((mx.zeros((3, 4)), mx.zeros((9, 4)), mx.zeros((3,), mx.int32)), {"weights": mx.ones((2,))}, "one for each"),
    ],
)
def test_bad_input_is_named(arguments, options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        linear_cross_entropy(*arguments, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_and_vmap_are_refused_in_words(reduction):
    head, hidden, targets = normal(9, 4), normal(3, 4), mx.arange(3)

    def loss(h):
        return linear_cross_entropy(h, head, targets, reduction=reduction).sum()

    with pytest.raises(TraceError, match="first derivatives only"):
        mx.grad(lambda h: mx.grad(loss)(h).square().sum())(hidden)
    with pytest.raises(InvalidArgumentError, match=r"mapped by mx\.vmap"):
        mx.vmap(lambda h, t: linear_cross_entropy(h, head, t))(normal(2, 3, 4), mx.zeros((2, 3), mx.int32))
