"""Each case of the contract: a model with its blocks checkpointed trains exactly as the plain one does."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoint_contract import assert_same, train, wrap_all, wrap_bare
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.lora import LoRALinear

WIDTH = 32


class Stack(nn.Module):
    """Three blocks of a class, one after the other."""

    def __init__(self, kind):
        super().__init__()
        self.layers = [kind() for _ in range(3)]

    def __call__(self, x, *args, **kwargs):
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return x


class DropoutBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x):
        return self.dropout(mx.tanh(self.inner(x)))


class TwoDropouts(DropoutBlock):
    def __init__(self):
        super().__init__()
        self.second = nn.Dropout(0.25)

    def __call__(self, x):
        return x + self.second(mx.sin(super().__call__(self.second(x))))


class AttentionBlock(nn.Module):
    def __init__(self, dropout=0.3):
        super().__init__()
        self.heads = 4
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x, mask=None):
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3) for part in self.project(x).split(3, -1)
        )
        scores = (q @ k.swapaxes(-1, -2)) * 0.35
        if mask is not None:
            scores = mx.where(mask, scores, -1e9) if mask.dtype == mx.bool_ else scores + mask
        y = self.dropout(mx.softmax(scores, -1)) @ v
        return x + self.out(y.transpose(0, 2, 1, 3).reshape(x.shape))


class FastAttention(AttentionBlock):
    def __call__(self, x, mask=None):
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3) for part in self.project(x).split(3, -1)
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask=mask)
        return x + self.dropout(self.out(y.transpose(0, 2, 1, 3).reshape(x.shape)))


class LoraBlock(nn.Module):
    def __init__(self):
        super().__init__()
        base = nn.QuantizedLinear.from_linear(nn.Linear(WIDTH, WIDTH), group_size=32, bits=4)
        self.lora = LoRALinear.from_base(base, r=4, dropout=0.5)
        self.lora.lora_b = mx.random.normal(self.lora.lora_b.shape)
        base.freeze()

    def __call__(self, x):
        return x + mx.tanh(self.lora(x))


class NormBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm(WIDTH)

    def __call__(self, x):
        return x + nn.relu(self.norm(self.inner(x)))


class GatherBlock(nn.Module):
    """Integers as arguments: indices into the sequence, and tokens into a table of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x, tokens, order):
        return x + mx.tanh(self.inner(mx.take(x, order, axis=1))) * self.table(tokens)


class KeyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x, *, key):
        return x + mx.tanh(self.inner(x)) * mx.random.normal(x.shape, key=key)


class TreeBlock(nn.Module):
    """Dictionaries, tuples, None, numbers and strings in and out."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, state, mode="tanh", scale=None):
        x, extra = state["x"], state["parts"]
        y = getattr(mx, mode)(self.inner(x)) * (1.0 if scale is None else scale) + extra[0]
        return {"x": y, "parts": (mx.sin(y), None, 3), "index": mx.argmax(y, axis=-1)}


class TreeStack(Stack):
    def __call__(self, x, scale):
        state = {"x": x, "parts": (x, None, 3)}
        for layer in self.layers:
            state = layer(state, mode="tanh", scale=scale)
            assert state["parts"][1:] == (None, 3)
        return state["x"] + state["parts"][0] + state["index"][..., None] * 1e-3


class InPlaceBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x):
        x += mx.tanh(self.inner(x))
        x[..., 0] = 2 * x[..., 1]
        return x


class StoppedBlock(nn.Module):
    """An output that stops the gradient comes before one that does not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x):
        y = mx.tanh(self.inner(x))
        return mx.stop_gradient(y), y * 2


class StoppedStack(Stack):
    def __call__(self, x):
        for layer in self.layers:
            still, moving = layer(x)
            x = x + still * moving
        return x


class GruBlock(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.recurrent = kind(WIDTH, WIDTH)

    def __call__(self, x):
        return x + self.recurrent(x)


class LstmBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(WIDTH, WIDTH)

    def __call__(self, x):
        return x + self.recurrent(x)[0]


class MoeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.experts = SwitchGLU(WIDTH, WIDTH, 4)

    def __call__(self, x):
        gates = mx.softmax(self.router(x), axis=-1)
        index = mx.stop_gradient(mx.argpartition(-gates, kth=1, axis=-1)[..., :2])
        weight = mx.take_along_axis(gates, index, axis=-1)
        return x + (self.experts(x, index) * weight[..., None]).sum(axis=-2)


class ConvBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm(WIDTH)
        self.dropout = nn.Dropout(0.2)

    def __call__(self, x):
        return x + self.dropout(nn.relu(self.norm(self.conv(x))))


class HalfBlock(DropoutBlock):
    def __init__(self):
        super().__init__()
        self.set_dtype(mx.bfloat16)

    def __call__(self, x):
        return super().__call__(x.astype(mx.bfloat16)).astype(mx.float32)


def square(model, *args, **kwargs):
    return mx.square(model(*args, **kwargs)).mean()


def batch(*more):
    key = mx.random.key(3)
    return (mx.random.normal((2, 6, WIDTH), key=key), *more)


ORDER = mx.array([3, 0, 5, 1, 2, 4])
TOKENS = mx.array([[1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 0]])
CAUSAL = mx.tril(mx.ones((6, 6), dtype=mx.bool_))

CASES = {
    "dropout": (DropoutBlock, Stack, square, batch()),
    "two dropouts": (TwoDropouts, Stack, square, batch()),
    "dropout in attention": (AttentionBlock, Stack, square, batch()),
    "boolean mask": (AttentionBlock, Stack, square, batch(CAUSAL)),
    "float mask": (AttentionBlock, Stack, square, batch(mx.where(CAUSAL, 0.0, -9.0))),
    "string mask": (FastAttention, Stack, square, batch("causal")),
    "no mask": (FastAttention, Stack, square, batch(None)),
    "lora on a quantized base": (LoraBlock, Stack, square, batch()),
    "batch norm": (NormBlock, Stack, square, batch()),
    "integers": (GatherBlock, Stack, square, batch(TOKENS, ORDER)),
    "key": (KeyBlock, Stack, lambda model, x, key: square(model, x, key=key), batch(mx.random.key(5))),
    "trees": (TreeBlock, TreeStack, square, batch(0.5)),
    "in place": (InPlaceBlock, Stack, lambda model, x: square(model, x + 0), batch()),
    "stopped output": (StoppedBlock, StoppedStack, square, batch()),
    "gru": (GruBlock, Stack, square, batch()),
    "lstm": (LstmBlock, Stack, square, batch()),
    "experts": (MoeBlock, Stack, square, batch()),
    "convolution": (ConvBlock, Stack, square, batch()),
    "bfloat16": (HalfBlock, Stack, square, batch()),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_trains_as_the_plain_model_does(name, compiled):
    kind, stack, loss, args = CASES[name]
    plain = train(lambda: stack(kind), loss, *args, compiled=compiled, count=[kind])
    checked = train(lambda: stack(kind), loss, *args, compiled=compiled, count=[kind], wrap=wrap_all(kind))
    assert plain.calls == (3 if compiled else 6)
    assert checked.calls == 2 * plain.calls
    assert_same(plain, checked)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["dropout", "batch norm", "lora on a quantized base", "integers", "experts"])
def test_trains_as_the_plain_model_does_under_mx_value_and_grad(name):
    kind, stack, loss, args = CASES[name]
    plain = train(lambda: stack(kind), loss, *args, flat=True, count=[kind])
    checked = train(lambda: stack(kind), loss, *args, flat=True, count=[kind], wrap=wrap_all(kind))
    assert checked.calls == 2 * plain.calls == 12
    assert_same(plain, checked)


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["dropout", "two dropouts", "lora on a quantized base", "batch norm"])
def test_mx_checkpoint_trains_otherwise(name):
    kind, stack, loss, args = CASES[name]
    plain = train(lambda: stack(kind), loss, *args)
    bare = train(lambda: stack(kind), loss, *args, wrap=wrap_bare(kind))
    with pytest.raises(AssertionError, match="apart"):
        assert_same(plain, bare, relative=1e-3)


@pytest.mark.parametrize("name", ["integers", "key"])
def test_mx_checkpoint_raises_on_integers(name):
    kind, stack, loss, args = CASES[name]
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)vjp"):
        train(lambda: stack(kind), loss, *args, wrap=wrap_bare(kind))


def test_mask_is_the_same_in_both_runs():
    """As if the mask were applied by hand: where the value is cut off, the gradient is."""
    from mlx_tune import checkpoint

    @checkpoint
    def block(x):
        return x * mx.random.bernoulli(0.5, x.shape)

    mx.random.seed(3)
    x = mx.ones((200,))
    value, gradient = mx.value_and_grad(lambda x: (block(x) * mx.arange(200)).sum())(x)
    mx.random.seed(3)
    mask = mx.random.bernoulli(0.5, (200,))
    assert mx.array_equal(gradient, mask * mx.arange(200))
    assert value.item() == (mask * mx.arange(200)).sum().item()


def test_steps_draw_differently_and_seeds_repeat():
    model = Stack(DropoutBlock)
    wrap_all(DropoutBlock)(model)
    x = batch()[0]
    gradient = nn.value_and_grad(model, lambda x: square(model, x))
    losses = []
    for seed in (1, None, 1):
        if seed is not None:
            mx.random.seed(seed)
        losses.append(gradient(x)[0].item())
    assert losses[0] == losses[2] != losses[1]
