"""Threads that run checkpointed functions: right, and at an end before the process is."""

import subprocess
import sys
import threading

import mlx.core as mx
import pytest

import mlx_tune as mt

RUNS = 4  # of each script: without care for the end of a thread, 6 to 9 of 10 abort

SCRIPT = """
import threading
from concurrent.futures import ThreadPoolExecutor
import mlx.core as mx
import mlx_tune as mt

def draws_nothing(x):
    return mx.tanh(x) * 2

def draws(x):
    return x * mx.random.uniform(shape=x.shape)

function = mt.checkpoint({body})

def work(seed=0):
    gradient = mx.grad(lambda x: function(x).sum())(mx.ones(4))
    mx.eval(gradient)
    return gradient.tolist()

{run}
print("finished")
"""
ONE = "thread = threading.Thread(target=work); thread.start(); thread.join()"
POOL = "with ThreadPoolExecutor(3) as pool: list(pool.map(work, range(6)))"


@pytest.mark.parametrize(("body", "run"), [("draws_nothing", ONE), ("draws", ONE), ("draws_nothing", POOL)])
def test_the_process_ends_well(body, run):
    script = SCRIPT.format(body=body, run=run)
    for _ in range(RUNS):
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (0, "finished\n"), ended.stderr


def in_thread(function):
    """What a function returns on a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def gradient_of(block, seed):
    mx.random.seed(seed)
    gradient = mx.grad(lambda x: block(x).sum())(mx.ones(4))
    after = mx.random.uniform()
    mx.eval(gradient, after)
    return gradient.tolist(), after.item()


def noisy(x):
    return mx.tanh(x * mx.random.uniform(shape=x.shape))


@pytest.mark.parametrize("block", [noisy, mx.tanh], ids=["draws", "draws nothing"])
def test_a_thread_s_draws_are_those_of_the_plain_function(block):
    plain = in_thread(lambda: gradient_of(block, 5))
    assert in_thread(lambda: gradient_of(mt.checkpoint(block), 5)) == plain
    assert gradient_of(mt.checkpoint(block), 5) == plain


def test_other_threads_go_on_when_one_has_ended():
    """What is compiled, and the streams of this thread, do not end with that one."""
    block = mt.checkpoint(noisy)
    compiled = mx.compile(mx.grad(lambda x: block(x).sum()), inputs=mx.random.state, outputs=mx.random.state)
    mx.random.seed(1)
    first = compiled(mx.ones(4)).tolist()

    def once():
        mx.random.seed(1)
        return compiled(mx.ones(4)).tolist()

    pending = mx.random.uniform(shape=(3,), key=mx.random.key(1)) + 1
    assert in_thread(once) == first
    assert in_thread(once) == first
    assert once() == first
    assert mx.all(pending >= 1).item()
