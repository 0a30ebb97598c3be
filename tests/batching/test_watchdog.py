import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mlx_tune.batching.isolation import IsolatedProbe
from mlx_tune.batching.journal import Journal
from mlx_tune.memory import MemoryBudget

BUDGET = 16_000_000


@pytest.fixture
def pids(tmp_path, monkeypatch):
    """The file in which a trial's factory says which processes there are: guard, trial, two children."""
    monkeypatch.setenv("SMALL_STEPS_PIDS", str(tmp_path / "pids"))
    return tmp_path / "pids"


def processes(file):
    """Those that are still there."""
    found = []
    for pid in json.loads(file.read_text()):
        try:
            found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for(condition, running):
    """Let a process get somewhere; it may take as long as it likes within ten minutes."""
    deadline = time.monotonic() + 600
    while not condition():
        assert running.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("factory", "timeout", "reason"),
    [
        ("leaves_children", None, None),
        ("killed_with_children", None, "its process was ended by SIGKILL"),
        ("hangs_with_children", 7, "its process took longer than trial_timeout=7.00 s and was ended"),
    ],
)
def test_what_a_trial_started_ends_with_it(pids, monkeypatch, factory, timeout, reason):
    class Patient(subprocess.Popen):
        """Its seconds are over when the children are there, however long that takes."""

        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            wait_for(pids.exists, self)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Patient)
    trial = IsolatedProbe(f"small_steps:{factory}", BUDGET, timeout).trial(2, None, 1)[-1]
    assert (trial.fits, trial.reason) == (reason is None, reason)
    assert psutil.wait_procs(processes(pids), timeout=60)[1] == []


SEARCH = """
import mlx_tune as mt
mt.autobatch(isolate="small_steps:{factory}", budget=16_000_000, max_batch=4, journal={journal!r},
             progress=False)
"""


def searching(factory, journal):
    code = SEARCH.format(factory=factory, journal=str(journal))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_search_that_is_killed_takes_its_trial_along_and_learns_nothing_from_it(tmp_path, pids, end):
    """The trial, what it started, and its files; the same search measures that size again."""
    search = searching("hangs_in_a_trial", tmp_path / "j")
    try:
        wait_for(pids.exists, search)
        left = processes(pids)
        assert len(left) == 4
        folder = left[1].cmdline()[-1]
        assert os.path.isdir(folder)
        search.send_signal(end)
        search.wait()
        assert psutil.wait_procs(left, timeout=60)[1] == []
    finally:
        search.kill()
        search.wait()
    assert not os.path.exists(folder)
    note = Journal(tmp_path / "j", asked=None, resolved=MemoryBudget(BUDGET))
    assert [note.recall(size, 1) for size in (1, 2, 3, 4)] == [None] * 4
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert [next(iter(line)) for line in lines] == ["mlx_tune_autobatch", "started", "interrupted"]


def test_a_trial_that_goes_down_with_everything_at_once_does_not_fit(tmp_path, pids):
    """As where the machine goes down, or a container is killed as a whole: nobody is left to say otherwise."""
    search = searching("hangs_in_a_trial", tmp_path / "j")
    wait_for(pids.exists, search)
    left = processes(pids)
    for process in left[:2]:
        process.suspend()
    search.kill()
    search.wait()
    for process in left:
        process.kill()
    assert psutil.wait_procs(left, timeout=60)[1] == []
    size = json.loads((tmp_path / "j").read_text().splitlines()[-1])["started"]
    trial = Journal(tmp_path / "j", asked=None, resolved=MemoryBudget(BUDGET)).recall(size, 1)[-1]
    assert trial.reason == "an earlier search did not survive this trial"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot ask to end with its parent")
def test_a_trial_whose_guard_is_killed_ends(tmp_path, pids):
    search = searching("hangs_in_a_trial", tmp_path / "j")
    try:
        wait_for(pids.exists, search)
        guard, trial, *children = processes(pids)
        guard.kill()
        assert psutil.wait_procs([guard, trial], timeout=60)[1] == []
    finally:
        search.kill()
        search.wait()
        for process in children:
            process.kill()
