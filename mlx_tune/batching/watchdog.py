"""Watches over one trial's process: ends it, and whatever it started, when it is done or its parent is gone.

A script of its own that imports nothing of the library: it is there at once, holds little memory, and no step that
hangs or crashes can stop it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

import psutil

#: Options of Linux's prctl, from <linux/prctl.h>.
_PARENT_DEATH_SIGNAL, _CHILD_SUBREAPER = 1, 36
#: Seconds that killed processes have to be gone, and how often those that they started meanwhile are looked for.
_PATIENCE, _ROUNDS = 10, 5


def main(folder: str, journal: str, last_line: str, *command: str) -> None:
    """Run a command, and print its exit code, unless the parent dies first.

    Standard input is the parent's: a line on it asks for the end, and its end without a line means that the parent
    was killed. The trial then proved nothing.

    Args:
        folder: Removed where the parent is not there any more to do so.
        journal: The file that is to hold `last_line` where the parent died in the middle of the trial; or "".
        last_line: That line.
        *command: The trial.
    """
    events: SimpleQueue[str] = SimpleQueue()
    signal.signal(signal.SIGTERM, lambda *_: events.put("orphaned"))
    _prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)  # processes that the parent forked may hold the pipe open
    _prctl(_CHILD_SUBREAPER, 1)  # what the trial leaves behind in other groups becomes a child of this process
    trial = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
        preexec_fn=lambda: _prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL),
    )

    def listen() -> None:
        events.put("asked" if sys.stdin.readline() else "orphaned")

    def wait() -> None:
        trial.wait()
        events.put("ended")

    for watch in (listen, wait):
        Thread(target=watch, daemon=True).start()
    orphaned = events.get() == "orphaned"
    if orphaned and journal and trial.poll() is None:
        with (
            suppress(OSError),
            open(journal, "a", encoding="utf-8") as file,
        ):  # a full disk must not keep the trial alive
            file.write(last_line)
    _end(trial)
    if orphaned:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        os.write(1, str(trial.returncode).encode())
    os._exit(0)  # a thread may still be waiting for the parent's line


def _end(trial: subprocess.Popen[bytes]) -> None:
    """Kill the trial, its group, and what else it started as far as that can be told."""
    tree = psutil.Process().children(recursive=True)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(trial.pid, signal.SIGKILL)
    for _ in range(_ROUNDS):
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([process for process in tree if process.pid != trial.pid], timeout=_PATIENCE)
        tree = [process for process in psutil.Process().children(recursive=True) if process.pid != trial.pid]
        if not tree:
            break
    trial.wait()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
