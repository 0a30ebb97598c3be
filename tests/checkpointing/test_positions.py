"""The trial: which modules work on each position alone, and that it leaves no trace."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from tiled_models import KINDS, made

from mlx_tune.checkpointing.positions import UntriedError, mixing


class Causal(nn.Module):
    """The mean of what came before."""

    def __call__(self, x):
        return mx.cumsum(x, axis=-2)


class Placed(nn.Module):
    """Adds an embedding of the position."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 8)

    def __call__(self, x):
        return x + self.table(mx.arange(x.shape[-2]))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def __call__(self, x, mask=None):
        return mx.softmax(self.q(x) @ self.k(x).swapaxes(-1, -2), axis=-1) @ x


class Remembering(nn.Module):
    def __call__(self, x):
        self.last = x
        return x


class Noisy(nn.Module):
    """Draws whichever mode it is in."""

    def __call__(self, x):
        return x + mx.random.normal(x.shape)


def tried(module):
    return mixing(module, lambda few: module(few[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_modules_that_do(kind, dtype):
    module = made(kind)
    module.set_dtype(dtype)
    if kind == "activation":  # nothing says how wide its inputs are
        with pytest.raises(UntriedError):
            tried(module)
        assert mixing(module, lambda few: module(few[0]), 2, [mx.zeros((1, 9, 4), dtype)]) is None
    else:
        assert tried(module) is None


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv1d(8, 8, 3, padding=1), "changing position 0 of its input changes position 1"),
        (Attending(), "changing position 0"),
        (nn.BatchNorm(8), "writes arrays"),
        (nn.BatchNorm(8, track_running_stats=False), "changing position 0"),
        (Placed(), "where other positions are not there"),
        (nn.Sequential(nn.Linear(8, 8), Causal()), "changing position 0 of its input changes position 1"),
        (nn.Sequential(nn.Linear(8, 8), nn.GRU(8, 8)), "changing position 0"),
        (nn.Sequential(nn.Linear(8, 8), Remembering()), "writes arrays"),
    ],
    ids=["convolution", "attention", "statistics", "batch norm", "positions", "causal", "recurrent", "writing"],
)
def test_modules_that_do_not(module, reason):
    assert reason in tried(module)


def test_other_arrays_are_cut_along():
    module = nn.MultiHeadAttention(8, 2)
    like = [mx.zeros((2, 9, 8))] * 3
    assert "changing position" in mixing(module, lambda few: module(*few), 2, like)


def test_draws_in_evaluation_mode_are_no_mixing():
    assert tried(nn.Sequential(nn.Linear(8, 8), Noisy())) is None


def test_a_trial_leaves_no_trace():
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm(8), nn.Dropout(0.5), Remembering())
    module.layers[2].eval()
    before, modes = dict(tree_flatten(module.state)), [part.training for part in module.modules()]
    key = mx.random.state[0]
    tried(module)
    assert [part.training for part in module.modules()] == modes
    after = dict(tree_flatten(module.state))
    assert after.keys() == before.keys()
    assert all(mx.array_equal(after[name], before[name]) for name in before)
    assert mx.random.state[0] is key or mx.array_equal(mx.random.state[0], key)


def test_arrays_without_values_cannot_be_tried():
    module = made("mlp")

    def inside(x):
        with pytest.raises(UntriedError):
            tried(module)
        return x

    mx.compile(inside, inputs=module.state)(mx.ones(1))
