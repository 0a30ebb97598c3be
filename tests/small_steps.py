"""A training step whose peak grows by a good megabyte a row, and factories that build it in other processes."""

import json
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

ROWS = 100


def training_step(model, optimizer, loss_of):
    """A step on one batch `x`: the loss `loss_of(model, x)`, and the model's update."""
    grad = nn.value_and_grad(model, loss_of)

    def step(x):
        loss, gradients = grad(model, x)
        optimizer.update(model, gradients)
        return loss

    return step


def build(dropout=0.0, compiled=False):
    """Step, make_batch and state; a batch is `[n, 100, 64]`."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(dropout), nn.BatchNorm(256), nn.Linear(256, 64))
    model.train()
    mx.eval(model.parameters())
    optimizer = optim.AdamW(1e-4)
    step = training_step(model, optimizer, lambda model, x: (model(x) - x).square().mean())
    if compiled:
        held = [model.state, optimizer.state, mx.random.state]
        step = mx.compile(step, inputs=held, outputs=held)
    return step, make_batch, (model, optimizer)


def make_batch(n):
    return mx.sin(mx.arange(n * ROWS * 64, dtype=mx.float32)).reshape(n, ROWS, 64)


def _beyond(size, harm):
    step, make_batch, state = build()

    def harmful(x):
        if x.shape[0] >= size:
            harm()
        return step(x)

    return harmful, make_batch, state


def factory():
    return build()


def killed_from_three():
    return _beyond(3, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _start_children():
    """Two processes that never end, one of them in a session of its own; the file in $SMALL_STEPS_PIDS has them."""
    forever = [sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"]
    children = [subprocess.Popen(forever, start_new_session=own) for own in (False, True)]
    place = os.environ["SMALL_STEPS_PIDS"]
    with open(place + ".new", "w") as file:
        json.dump([os.getppid(), os.getpid(), *(child.pid for child in children)], file)
    os.replace(place + ".new", place)


def leaves_children():
    _start_children()
    return build()


def killed_with_children():
    _start_children()
    os.kill(os.getpid(), signal.SIGKILL)


def hangs_with_children():
    _start_children()
    time.sleep(600)


def hangs_in_a_trial():
    """Not while its graph is read: it has none."""
    _, make_batch, state = build()

    def hang(x):
        x.sum().item()
        _start_children()
        time.sleep(600)

    return hang, make_batch, state


def hangs():
    time.sleep(600)


def broken():
    raise ValueError("the factory's own words")
