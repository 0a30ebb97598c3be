"""Values that are saved instead of computed again: the same gradients, between plain and checkpointed in memory."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoint_contract import apart, assert_same, train
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_tune as mt

W = [mx.random.normal((8, 8), key=mx.random.key(i)) * 0.3 for i in range(4)]


def block(x, a, b, c, d):
    """A residual block whose marked values feed each other and the outside."""
    first = mt.keep(x @ a, "first")
    second = mt.keep(mx.tanh(first) @ b, "second")
    index = mt.keep(mx.stop_gradient(mx.argmax(second, axis=-1)), "index")
    third = mt.keep(mx.sin(second + first) @ c, "third")
    y = mx.sin(third) @ d + first * x
    return y + mx.take_along_axis(y, index[:, None], axis=-1)


NAMES = ["first", "second", "third", "index"]


@settings(max_examples=20, deadline=None)
@given(names=st.sets(st.sampled_from(NAMES)), seed=st.integers(0, 5))
def test_any_choice_gives_the_plain_gradients(names, seed):
    x = mx.random.normal((4, 8), key=mx.random.key(seed))
    fast = mt.checkpoint(block, keep=names)
    plain = mx.grad(lambda *args: mx.square(block(*args)).sum(), (0, 1, 2, 3, 4))(x, *W)
    kept = mx.grad(lambda *args: mx.square(fast(*args)).sum(), (0, 1, 2, 3, 4))(x, *W)
    for a, b in zip(plain, kept, strict=True):
        assert mx.allclose(a, b, rtol=1e-6, atol=1e-6 * mx.abs(a).max().item())


@pytest.mark.cpu_only
@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second", "third"]])
def test_second_derivatives(names):
    x = mx.random.normal((4, 8), key=mx.random.key(9))

    def penalty(function):
        def of(x, a):
            return mx.square(mx.grad(lambda x: mx.square(function(x, a, *W[1:])).sum())(x)).sum()

        return mx.grad(of, (0, 1))(x, W[0])

    for a, b in zip(penalty(block), penalty(mt.checkpoint(block, keep=names)), strict=True):
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-5 * mx.abs(a).max().item())


def test_a_name_marked_in_a_loop_saves_each():
    def loop(x, w):
        for _ in range(3):
            x = mx.sin(mt.keep(x @ w, "product"))
        return x.sum()

    x = mx.random.normal((2, 8), key=mx.random.key(1))
    plain = mx.grad(loop, (0, 1))(x, W[0])
    kept = mx.grad(mt.checkpoint(loop, keep=["product"]), (0, 1))(x, W[0])
    assert all(mx.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(plain, kept, strict=True))


class Wide(nn.Module):
    """A product that is worth keeping, and cheap steps around it that are not."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64)
        self.dropout = nn.Dropout(0.1)

    def __call__(self, x):
        y = mt.keep(self.up(x), "up")
        for _ in range(6):
            y = mx.sin(y)
        return x + self.dropout(self.down(y))


class Drawing(nn.Module):
    """Draws before and after the value that is kept."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x):
        y = apart(mt.keep(self.up(apart(self.dropout(apart(x)))), "up"))
        return apart(x + apart(self.dropout(apart(self.down(apart(mx.sin(y)))))))


@pytest.mark.cpu_only
@pytest.mark.parametrize("flat", [False, True], ids=["nn.value_and_grad", "mx.value_and_grad"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_trains_as_the_plain_model_does(compiled, flat):
    def loss(model, x):
        return mx.square(apart(model(x))).mean()

    x = mx.random.normal((4, 16), key=mx.random.key(2))
    how = {"compiled": compiled, "flat": flat, "count": [Drawing]}
    outcomes = [
        train(lambda: nn.Sequential(Drawing(), Drawing()), loss, x, wrap=wrap, **how)
        for wrap in (lambda model: None, lambda model: mt.checkpoint_blocks(model, keep=["up"]))
    ]
    assert outcomes[1].calls == 2 * outcomes[0].calls
    assert_same(*outcomes)


@pytest.mark.cpu_only
def test_memory_lies_between_plain_and_checkpointed():
    peaks, results = [], []
    x = mx.random.normal((512, 64), key=mx.random.key(1))
    for wrap in (lambda b: b, lambda b: mt.checkpoint(b, keep=["up"]), mt.checkpoint):
        mx.random.seed(0)
        model = nn.Sequential(*[Wide() for _ in range(12)])
        for layer in model.layers:
            wrap(layer)
        mx.eval(model.parameters(), x)
        gradient = nn.value_and_grad(model, lambda x, model=model: mx.square(model(x)).mean())
        # A limit of one byte: MLX waits for what it has started, so that the peak is the same on a busy machine.
        with mt.memory_limit(1), mt.track_memory() as memory:
            value, grads = gradient(x)
            mx.eval(value, grads)
        peaks.append(memory.peak_bytes)
        results.append((value, grads))
    plain, kept, full = peaks
    assert full < kept < plain
    for value, grads in results[1:]:
        assert value.item() == results[0][0].item()
        for a, b in zip(results[0][1]["layers"], grads["layers"], strict=True):
            assert mx.array_equal(a["up"]["weight"], b["up"]["weight"])


def test_the_innermost_block_has_the_say():
    def inner(x):
        return mx.sin(mt.keep(x * 2, "value"))

    def outer(x):
        return mt.keep(mt.checkpoint(inner)(x) * 3, "value").sum()

    x = mx.array([1.0, 2.0])
    kept = mx.grad(mt.checkpoint(outer, keep=["value"]))(x)
    assert mx.array_equal(kept, mx.grad(lambda x: (mx.sin(x * 2) * 3).sum())(x))


def test_a_mark_alone_does_nothing():
    x = mx.ones((2,))
    assert mt.keep(x, "name") is x


def test_a_name_that_is_not_marked_is_an_error():
    with pytest.raises(
        mt.CheckpointError, match=r"keep=\['fourth'\] names no value that block marks; it marked 'first'"
    ):
        mt.checkpoint(block, keep=["first", "fourth"])(mx.ones((4, 8)), *W)
    with pytest.raises(mt.CheckpointError, match="it marked nothing"):
        mt.checkpoint(lambda x: x, keep=["first"])(mx.ones((4, 8)))


def test_marks_that_change_in_the_second_run_are_an_error():
    widths = iter([2, 3])

    def unsteady(x):
        return mt.keep(mx.ones((next(widths),)) * x, "value").sum()

    with pytest.raises(mt.CheckpointError, match="value 1 when the block was run again"):
        mx.grad(mt.checkpoint(unsteady, keep=["value"]))(mx.array(1.0))


@pytest.mark.parametrize(("arguments", "text"), [((3, "name"), "was given int"), ((mx.ones(1), 3), "was given 3")])
def test_wrong_arguments(arguments, text):
    with pytest.raises(mt.InvalidArgumentError, match=text):
        mt.keep(*arguments)
