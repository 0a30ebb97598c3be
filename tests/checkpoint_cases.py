"""The cases of the contract: blocks that do each of the things that a second run can get wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from checkpoint_contract import apart, train
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.tuner.lora import LoRALinear

WIDTH = 32


def tanh(x):
    return apart(mx.tanh(apart(x)))


def plus(x, y):
    return apart(x + y)


def times(x, y):
    return apart(apart(x) * apart(y))


class Dropout(nn.Dropout):
    def __call__(self, x):
        return apart(super().__call__(apart(x)))


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
        self.dropout = Dropout(0.5)

    def __call__(self, x):
        return self.dropout(tanh(self.inner(x)))


class TwoDropouts(DropoutBlock):
    def __init__(self):
        super().__init__()
        self.second = Dropout(0.5)

    def __call__(self, x):
        return plus(x, self.second(tanh(super().__call__(self.second(x)))))


class AttentionBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = 4
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = Dropout(0.5)

    def __call__(self, x, mask=None):
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3) for part in self.project(x).split(3, -1)
        )
        scores = apart(q @ k.swapaxes(-1, -2))
        if mask is not None:
            scores = apart(mx.where(mask, scores, -1e9) if mask.dtype == mx.bool_ else scores + mask)
        y = self.dropout(mx.softmax(scores, -1)) @ v
        return plus(x, self.out(y.transpose(0, 2, 1, 3).reshape(x.shape)))


class FastAttention(AttentionBlock):
    def __call__(self, x, mask=None):
        q, k, v = (
            part.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3) for part in self.project(x).split(3, -1)
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.35, mask=mask)
        return plus(x, self.dropout(self.out(y.transpose(0, 2, 1, 3).reshape(x.shape))))


class LoraBlock(nn.Module):
    def __init__(self):
        super().__init__()
        base = nn.QuantizedLinear.from_linear(nn.Linear(WIDTH, WIDTH), group_size=32, bits=4)
        self.lora = LoRALinear.from_base(base, r=4, dropout=0.5)
        self.lora.lora_b = mx.random.normal(self.lora.lora_b.shape)
        base.freeze()

    def __call__(self, x):
        return plus(x, tanh(self.lora(x)))


class NormBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm(WIDTH)

    def __call__(self, x):
        return plus(x, tanh(apart(self.norm(self.inner(x)))))


class GatherBlock(nn.Module):
    """Integers as arguments: indices into the sequence, and tokens into a table of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x, tokens, order):
        return plus(x, times(tanh(self.inner(mx.take(x, order, axis=1))), self.table(tokens)))


class KeyBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x, *, key):
        return plus(x, times(tanh(self.inner(x)), mx.random.normal(x.shape, key=key)))


class TreeBlock(nn.Module):
    """Dictionaries, tuples, None, numbers and strings in and out."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, state, mode="tanh", scale=None):
        x, extra = state["x"], state["parts"]
        y = apart(getattr(mx, mode)(apart(self.inner(x))))
        y = plus(y if scale is None else apart(y * scale), extra[0])
        return {"x": y, "parts": (tanh(y), None, 3), "index": mx.argmax(y, axis=-1)}


class TreeStack(Stack):
    def __call__(self, x, scale):
        state = {"x": x, "parts": (x, None, 3)}
        for layer in self.layers:
            state = layer(state, mode="tanh", scale=scale)
            assert state["parts"][1:] == (None, 3)
        index = mx.stop_gradient(state["index"][..., None])
        return plus(state["x"], times(state["parts"][0], mx.take_along_axis(state["x"], index, axis=-1)))


class InPlaceBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x):
        x += tanh(self.inner(x))
        x[..., 0] = x[..., 1]
        return apart(x)


class StoppedBlock(nn.Module):
    """An output that stops the gradient comes before one that does not."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def __call__(self, x):
        y = tanh(self.inner(x))
        return mx.stop_gradient(y), apart(y * 2)


class StoppedStack(Stack):
    def __call__(self, x):
        for layer in self.layers:
            still, moving = layer(x)
            x = plus(x, times(still, moving))
        return x


class GruBlock(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.recurrent = kind(WIDTH, WIDTH)

    def __call__(self, x):
        return plus(x, self.recurrent(x))


class LstmBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(WIDTH, WIDTH)

    def __call__(self, x):
        return plus(x, self.recurrent(x)[0])


class MoeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.experts = SwitchGLU(WIDTH, WIDTH, 4)

    def __call__(self, x):
        gates = mx.softmax(self.router(x), axis=-1)
        index = mx.stop_gradient(mx.argpartition(-gates, kth=1, axis=-1)[..., :2])
        weight = mx.take_along_axis(gates, index, axis=-1)
        return plus(x, times(self.experts(x, index), weight[..., None]).sum(axis=-2))


class ConvBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.dropout = Dropout(0.5)

    def __call__(self, x):
        return plus(x, self.dropout(tanh(self.conv(x))))


class HalfBlock(DropoutBlock):
    def __init__(self):
        super().__init__()
        self.set_dtype(mx.bfloat16)

    def __call__(self, x):
        return apart(super().__call__(apart(x.astype(mx.bfloat16))).astype(mx.float32))


class ClosureBlock(nn.Module):
    """Scales with a weight that is another module's, which it has from a function that it was given."""

    def __init__(self, scale):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.scale = scale

    def __call__(self, x):
        return plus(x, times(tanh(self.inner(x)), self.scale()))


class ClosureStack(Stack):
    def __init__(self, kind):
        shared = nn.RMSNorm(WIDTH)
        super().__init__(lambda: kind(lambda: shared.weight))
        self.shared = shared


class WholeModelStack(Stack):
    """The function that the blocks were given closes over the model, and so over every block."""

    def __init__(self, kind):
        super().__init__(lambda: kind(lambda: self.shared.weight))
        self.shared = nn.RMSNorm(WIDTH)


class ParkingBlock(nn.Module):
    """Leaves a value where the next block finds it, as models with skip connections do."""

    def __init__(self, shelf):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.shelf = shelf

    def __call__(self, x):
        y = tanh(self.inner(x))
        if self.shelf.value is not None:
            y = plus(y, self.shelf.value)
        self.shelf.value = apart(y * 2)
        return y


class ParkingStack(Stack):
    def __init__(self, kind):
        self.shelf = SimpleNamespace(value=None)
        super().__init__(lambda: kind(self.shelf))

    def __call__(self, x):
        self.shelf.value = None
        return plus(super().__call__(x), self.shelf.value)


class CacheBlock(nn.Module):
    """Keys and values of what came before are in a cache, which it writes and reads."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)

    def __call__(self, x, cache):
        q, k, v = (part[:, None] for part in self.project(x).split(3, -1))
        k, v = cache.update_and_fetch(k, v)
        return plus(x, (mx.softmax(q @ k.swapaxes(-1, -2), -1) @ v)[:, 0])


class CacheStack(Stack):
    def __call__(self, x):
        caches = [KVCache() for _ in self.layers]
        for part in (x[:, :4], x[:, 4:]):
            for layer, cache in zip(self.layers, caches, strict=True):
                part = layer(part, cache=cache)
        assert all(cache.offset == x.shape[1] for cache in caches)
        return part


class BasisBlock(nn.Module):
    """An operation that has no gradient works on a frozen weight, and on one that is no parameter."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.basis = mx.random.normal((WIDTH, WIDTH))
        self._other = mx.random.normal((WIDTH, WIDTH))
        self.freeze(keys=["basis"], recurse=False)

    def __call__(self, x):
        turn, _ = mx.linalg.qr(apart(self.basis + self._other), stream=mx.cpu)
        return plus(x, tanh(self.inner(x)) @ turn)


def square(model, *args, **kwargs):
    return mx.square(apart(model(*args, **kwargs))).mean()


def batch(*more):
    key = mx.random.key(3)
    return (mx.random.normal((2, 6, WIDTH), key=key), *more)


ORDER = mx.array([3, 0, 5, 1, 2, 4])
TOKENS = mx.array([[1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 0]])
CAUSAL = mx.tril(mx.ones((6, 6), dtype=mx.bool_))


@dataclass
class Case:
    """A block, the model around it, and how far its gradients may be off.

    Attributes:
        relative: Zero, unless an array is used on both sides of a block's boundary: then the sum of its cotangents is
            taken in another order.
        calls: How often blocks are called in a step of the plain model.
        compiled: Which ways to run it.
        with_model: Whether the model is among the arguments of what is differentiated, as in mlx-lm's trainer: then
            every array of it is a tracer.
        extra: How often blocks run once more in the first step, to find out what has no gradient.
    """

    kind: type
    args: tuple[Any, ...] = batch()
    stack: type = Stack
    loss: Callable[..., mx.array] = square
    relative: float = 0.0
    calls: int = 3
    compiled: Sequence[bool] = (False, True)
    extra: int = 0
    with_model: bool = False

    def train(self, **how):
        return train(
            lambda: self.stack(self.kind), self.loss, *self.args, count=[self.kind], with_model=self.with_model, **how
        )


CASES = {
    "dropout": Case(DropoutBlock),
    "two dropouts": Case(TwoDropouts),
    "dropout in attention": Case(AttentionBlock),
    "boolean mask": Case(AttentionBlock, batch(CAUSAL)),
    "float mask": Case(AttentionBlock, batch(mx.where(CAUSAL, 0.0, -9.0))),
    "string mask": Case(FastAttention, batch("causal")),
    "no mask": Case(FastAttention, batch(None)),
    "lora on a quantized base": Case(LoraBlock),
    "batch norm": Case(NormBlock),
    "integers": Case(GatherBlock, batch(TOKENS, ORDER)),
    "key": Case(KeyBlock, batch(mx.random.key(5)), loss=lambda model, x, key: square(model, x, key=key)),
    "trees": Case(TreeBlock, batch(0.5), TreeStack),
    "in place": Case(InPlaceBlock, loss=lambda model, x: square(model, apart(x + 0))),
    "stopped output": Case(StoppedBlock, stack=StoppedStack),
    "captured by a closure": Case(ClosureBlock, stack=ClosureStack, relative=1e-6),
    "captured with the model": Case(ClosureBlock, stack=WholeModelStack, relative=1e-6),
    "parked on another object": Case(ParkingBlock, stack=ParkingStack, relative=1e-6),
    "cache": Case(CacheBlock, stack=CacheStack, relative=1e-6, calls=6),
    "no gradient for a constant": Case(BasisBlock, extra=3),
    "no gradient for a constant of the arguments": Case(BasisBlock, extra=15, with_model=True),
    "gru": Case(GruBlock, compiled=(False,)),  # an LSTM compiles the same, and each costs twenty runs of g++
    "lstm": Case(LstmBlock),
    "experts": Case(MoeBlock),
    "convolution": Case(ConvBlock),
    "bfloat16": Case(HalfBlock),
}
