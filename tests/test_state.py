"""Snapshot: what a step changes comes back bit for bit, and no second copy is held meanwhile."""

import random
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_tune.errors import InvalidArgumentError, MlxTuneError
from mlx_tune.state import Snapshot, same_random_stream


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.BatchNorm(8), nn.Dropout(0.5), nn.Linear(8, 8)]
        self.scale = mx.ones(8, mx.bfloat16)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


class Small(nn.Module):
    """Weights, moving statistics and randomness, in few kernels: each takes a compiler half a second."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout, self.moving = nn.Linear(8, 8, bias=False), nn.Dropout(0.5), mx.zeros(8)

    def __call__(self, x):
        x = self.dropout(self.inner(x))
        self.moving = self.moving + mx.stop_gradient(x).mean(0)
        return x - self.moving


def build(compiled=False):
    mx.random.seed(3)
    if compiled:
        model, optimizer = Small(), optim.SGD(1e-2, momentum=0.9)
    else:
        model, optimizer = Net(), optim.AdamW(1e-2)
        model.layers[0].freeze()
    mx.eval(model.parameters())
    grad = nn.value_and_grad(model, lambda model, x: (model(x) ** 2).mean())

    def step(x):
        loss, gradients = grad(model, x)
        optimizer.update(model, gradients)
        return loss

    if compiled:
        held = [model.state, optimizer.state, mx.random.state]
        step = mx.compile(step, inputs=held, outputs=held)
    return model, optimizer, step


def train(model, optimizer, step, steps=2):
    losses = []
    for _ in range(steps):
        loss = step(mx.ones((4, 8)))
        mx.eval(loss, model.state, optimizer.state)
        losses.append(loss.item())
    return losses


def bits(model, optimizer):
    """Every array with its exact bytes, by path."""
    flat = [*tree_flatten(model.state), *((f"optimizer.{k}", v) for k, v in tree_flatten(optimizer.state))]
    return {
        k: (v.dtype, v.shape, bytes(memoryview(v.reshape(-1).view(mx.uint8))))
        for k, v in flat
        if isinstance(v, mx.array)
    }


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("started", [False, True], ids=["fresh optimizer", "running optimizer"])
def test_everything_comes_back_bit_for_bit(spill, started):
    model, optimizer, step = build()
    if started:
        train(model, optimizer, step)
    before, key, calls = bits(model, optimizer), mx.random.state[0].tolist(), model.calls
    with Snapshot((model, optimizer), spill=spill):
        train(model, optimizer, step)
        model.eval()
        model.unfreeze()
        assert bits(model, optimizer) != before
    assert bits(model, optimizer) == before
    assert mx.random.state[0].tolist() == key
    assert model.calls == calls
    assert model.training
    assert "weight" in model.layers[0]._no_grad


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("spill", [False, True])
def test_training_goes_on_as_if_nothing_had_happened(spill, compiled):
    model, optimizer, step = build(compiled)
    train(model, optimizer, step, 1)
    snapshot = Snapshot((model, optimizer), spill=spill)
    expected = train(model, optimizer, step, 3)
    snapshot.restore()
    assert train(model, optimizer, step, 3) == expected  # the compiled step sees the restored arrays, too
    snapshot.restore()
    assert train(model, optimizer, step, 3) == expected
    snapshot.discard()


def test_containers_keep_their_identity():
    model, optimizer, step = build()
    train(model, optimizer, step, 1)
    state, moments, layers = model.state, optimizer.state, model.layers
    with Snapshot((model, optimizer), spill=True):
        train(model, optimizer, step)
        model.extra = mx.ones(3)
    assert model.state is state
    assert optimizer.state is moments
    assert model.layers is layers
    assert "extra" not in model


def test_tied_weights_stay_tied():
    model, optimizer, _ = build()
    model.head = model.layers[3].weight
    with Snapshot((model, optimizer), spill=True):
        model.head = model.head * 2
    assert model.head is model.layers[3].weight


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_passes_through_after_the_state_is_back(error):
    model, optimizer, step = build()
    before = bits(model, optimizer)

    def interrupted():
        with Snapshot((model, optimizer), spill=True):
            train(model, optimizer, step)
            raise error("mine")

    with pytest.raises(error, match="mine"):
        interrupted()
    assert bits(model, optimizer) == before


def test_an_interrupt_while_restoring_waits_until_everything_is_back(monkeypatch):
    model, optimizer, step = build()
    before = bits(model, optimizer)
    snapshot = Snapshot((model, optimizer), spill=True)
    train(model, optimizer, step)
    load = mx.load

    def interrupted_load(path):
        signal.raise_signal(signal.SIGINT)
        return load(path)

    monkeypatch.setattr(mx, "load", interrupted_load)
    with pytest.raises(KeyboardInterrupt):
        snapshot.restore()
    assert bits(model, optimizer) == before
    snapshot.discard()


def test_streams_of_every_library_come_back():
    model = nn.Linear(2, 2)
    mx.random.seed(11)
    random.seed(11)
    np.random.seed(11)
    mx.eval(mx.random.uniform())  # a stream that is not at its seed any more
    with Snapshot(model, spill=True):
        first = mx.random.uniform(shape=(3,)).tolist(), random.random(), np.random.rand()
    assert (mx.random.uniform(shape=(3,)).tolist(), random.random(), np.random.rand()) == first


def test_spilling_holds_no_second_copy():
    mx.random.seed(0)
    model = nn.Linear(1000, 1000, bias=False)
    mx.eval(model.parameters())
    size = model.weight.nbytes
    held = mx.get_active_memory()
    with Snapshot(model, spill=True):
        mx.eval(model.update({"weight": model.weight * 2}))
        mx.synchronize()  # buffers are given back a moment after the work on them is done
        assert mx.get_active_memory() <= held + size // 10
        mx.reset_peak_memory()
    mx.synchronize()
    assert mx.get_peak_memory() <= held + size // 10  # nor does restoring
    assert abs(mx.get_active_memory() - held) <= size // 10


def test_frozen_arrays_stay_off_the_disk(tmp_path):
    model = nn.Linear(100, 100)
    model.freeze(keys=["weight"])
    snapshot = Snapshot(model, spill=True, folder=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    assert [array.shape for array in mx.load(str(file)).values()] == [(100,)]
    assert file.stat().st_size < model.weight.nbytes
    snapshot.discard()
    assert not list(tmp_path.iterdir())


DTYPES = [mx.bool_, mx.int8, mx.uint32, mx.int64, mx.float16, mx.bfloat16, mx.float32, mx.float64, mx.complex64]


@pytest.mark.parametrize("shape", [(3,), (), (0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_every_dtype_and_shape_come_back(dtype, shape):
    state = {"a": mx.zeros(shape, dtype, stream=mx.cpu)}
    with Snapshot(state, spill=True):
        state["a"] = mx.ones((2,))
    assert (state["a"].dtype, state["a"].shape) == (dtype, shape)
    assert not state["a"].astype(mx.bool_, stream=mx.cpu).any(stream=mx.cpu).item()


def test_a_full_disk_is_an_error_with_both_sizes_before_anything_is_written(tmp_path, monkeypatch):
    model = nn.Linear(100, 100)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    with pytest.raises(MlxTuneError, match=r"40\.4 kB on disk, and .* has 1\.00 kB free.*TMPDIR"):
        Snapshot(model, spill=True, folder=tmp_path)
    assert not list(Path(tmp_path).iterdir())


def test_a_state_that_nothing_could_change_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"state=a bare array.*state=\(model, optimizer\)"):
        Snapshot(mx.ones(3))


def test_an_empty_state_keeps_the_random_stream():
    mx.random.seed(5)
    with Snapshot((), spill=True):
        mx.eval(mx.random.uniform())
    assert mx.random.state[0].tolist() == [0, 5]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 + 11])
@pytest.mark.parametrize("draws", [0, 1, 5])
def test_draws_in_the_block_do_not_show_after_it(seed, draws):
    mx.random.seed(seed)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(seed)
    with same_random_stream():
        for _ in range(draws):
            mx.random.normal((3,))
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def draw_and_fail():
    mx.random.seed(99)
    raise KeyError


def test_nor_does_an_error_show_in_the_stream():
    mx.random.seed(1)
    expected = mx.random.uniform().item()
    mx.random.seed(1)
    with pytest.raises(KeyError), same_random_stream():
        draw_and_fail()
    assert mx.random.uniform().item() == expected
