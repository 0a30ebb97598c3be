"""Draws: repeated in the block, untouched everywhere else."""

import threading

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune as mt
from mlx_tune.checkpointing.block.randomness import draws_from, thread_stream
from mlx_tune.errors import BackendError


def test_stream_has_moved_on_as_after_the_plain_block():
    def block(x):
        return x * mx.random.uniform(shape=x.shape) + mx.random.normal(x.shape)

    after = []
    for function in (block, mt.checkpoint(block)):
        mx.random.seed(5)
        mx.eval(mx.grad(lambda x, f=function: f(x).sum())(mx.ones((3,))))
        after.append((mx.random.state[0].tolist(), mx.random.uniform().item()))
    assert after[0] == after[1]


def test_every_way_of_drawing_is_repeated():
    from mlx.core.random import gumbel as imported_by_name

    def block(x):
        shape = x.shape
        y = x * mx.random.uniform(shape=shape) * mx.random.normal(shape) * imported_by_name(shape)
        y = y * mx.random.truncated_normal(-1.0, 1.0, shape) * mx.random.laplace(shape)
        y = y * mx.random.randint(1, 5, shape) * mx.random.categorical(mx.zeros((3, 4)), num_samples=1)[:, 0]
        y = y[mx.random.permutation(3)] * nn.Dropout(0.5)(mx.ones(shape))
        return y * nn.init.normal()(mx.zeros(shape))

    x = mx.array([1.0, 2.0, 3.0])
    results = []
    for function in (block, mt.checkpoint(block)):
        mx.random.seed(11)
        results.append(mx.value_and_grad(lambda x, f=function: f(x).sum())(x))
    assert results[0][0].item() == results[1][0].item()
    assert mx.array_equal(results[0][1], results[1][1])


def test_draws_of_another_thread_are_untouched():
    """A data loader draws while the step's block runs, in both runs."""
    go, done = threading.Semaphore(0), threading.Semaphore(0)
    drawn = []

    def loader():
        mx.random.seed(9)
        for _ in range(2):
            go.acquire()
            drawn.append(mx.random.uniform(shape=(2,)).tolist())
            done.release()

    def block(x):
        y = x * mx.random.uniform(shape=x.shape)
        go.release()
        done.acquire()
        return y * mx.random.uniform(shape=x.shape)

    thread = threading.Thread(target=loader)
    thread.start()
    mx.random.seed(1)
    value, gradient = mx.value_and_grad(lambda x: mt.checkpoint(block)(x).sum())(mx.ones((4,)))
    thread.join()
    assert value.item() == pytest.approx(gradient.sum().item(), rel=1e-6)
    mx.random.seed(9)
    assert drawn == [mx.random.uniform(shape=(2,)).tolist() for _ in range(2)]


def test_second_run_is_on_the_stream_of_the_first():
    """Which may be another device, with other rounding."""
    other = mx.new_stream(mx.cpu)
    streams = []

    @mt.checkpoint
    def block(x):
        streams.append(mx.default_stream(mx.default_device()))
        return mx.sin(x)

    def loss(x):
        with mx.stream(other):
            y = block(x)
        return y.sum()

    before = mx.default_stream(mx.default_device())
    mx.eval(mx.grad(loss)(mx.ones((2,))))
    assert streams == [other, other]
    assert mx.default_stream(mx.default_device()) == before != other


def test_draws_from_restores_after_an_error():
    mx.random.seed(2)
    before = mx.random.state[0].tolist()

    def fail():
        with draws_from(mx.random.key(0)):
            mx.random.uniform()
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert mx.random.state[0].tolist() == before


def test_older_mlx_hands_out_the_list_itself(monkeypatch):
    stream = [mx.random.key(0)]
    monkeypatch.setattr(mx.random, "state", stream, raising=False)
    assert thread_stream() is stream


def test_unknown_stream_is_named(monkeypatch):
    monkeypatch.setattr(mx.random, "state", (), raising=False)
    with pytest.raises(BackendError, match="tuple"):
        thread_stream()
