"""Evaluating with the device keeping up with dispatch, so that peak memory is the floor. Linux, CPU only.

A worker thread runs what `eval` dispatches. Under the lowest memory limit `eval` waits for it, but it can do so at
every tenth task only (`DISPATCHES_PER_TASK` in mlx/backend/cpu/encoder.h); in between it runs ahead as far as the
machine lets it. Here dispatch runs at idle priority on the core that the worker has, which goes first whenever it has
something to do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

#: Whether threads can choose their core and their priority here.
CAN_KEEP_UP = sys.platform == "linux"


def keep_up() -> None:
    """Let MLX's worker run before this thread does, from now to the end of the process.

    A thread that may not raise its priority cannot leave the idle one again, so this is for processes of their own.
    """
    mx.eval(mx.zeros(2) + 1)  # the worker is there from now on
    core = max(os.sched_getaffinity(0))
    for task in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def in_own_process(file: str, *arguments: str) -> str:
    """Run a file of the tests in a process of its own, and return what it prints.

    Args:
        file: The file, which calls `keep_up()` where it is run as a program.
        arguments: What it is to do.
    """
    folders = [*sys.path, os.path.dirname(__file__)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    done = subprocess.run([sys.executable, file, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{Path(file).name} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def free_peak(run: Callable[[], Any]) -> int:
    """The peak of active memory while `run()` evaluates something, with dispatch as far ahead as it gets.

    Args:
        run: Builds and evaluates it.
    """
    mx.clear_cache()
    mx.reset_peak_memory()
    run()
    mx.synchronize()
    return mx.get_peak_memory()


def throttled_peak(run: Callable[[], Any]) -> int:
    """The peak of active memory while `run()` evaluates something under the lowest memory limit.

    Args:
        run: Builds and evaluates it.
    """
    mx.clear_cache()
    previous = mx.set_memory_limit(1)
    mx.reset_peak_memory()
    try:
        run()
        mx.synchronize()
    finally:
        mx.set_memory_limit(previous)
    return mx.get_peak_memory()
