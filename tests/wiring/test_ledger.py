"""Processes that share what may be wired: never more in all than the cap, and dead ones never count."""

import fcntl
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from metal_stand_in import GIB, MetalStandIn

import mlx_tune as mt
from mlx_tune.diagnosis.checks import machine
from mlx_tune.wiring import context, ledger
from mlx_tune.wiring.ledger import Ledger, Share
from mlx_tune.wiring.registry import Registry, WiredRequest

CAP = 48 * GIB


class KilledError(BaseException):
    """SIGKILL, in the middle of whatever its process was doing."""


class Mortal(Ledger):
    """A ledger whose process may die at any step of any of its calls."""

    steps_to_live: float = float("inf")

    def _live(self):
        self.steps_to_live -= 1
        if self.steps_to_live < 0:
            raise KilledError

    def _others(self, folder):
        self._live()
        return super()._others(folder)

    def _write(self, folder, wired_bytes):
        self._live()
        super()._write(folder, wired_bytes)
        self._live()


class Process:
    """A ledger, a registry and the limit that MLX would have, as one process has them."""

    def __init__(self, folder):
        self.limit, self.tokens = 0, []
        self.ledger = Mortal(folder)
        self.registry = Registry(self._set, lambda: None, self.ledger.settle)

    def _set(self, limit):
        self.ledger._live()
        self.limit, previous = limit, self.limit
        return previous

    def enter(self, wanted):
        token = self.registry.make_token()
        self.tokens.append(token)
        self.registry.enter(token, WiredRequest(extra_bytes=wanted), CAP, lambda all_: self.ledger.claim(all_, CAP))

    def leave(self, rng):
        if self.tokens:
            self.registry.leave(self.tokens.pop(rng.randrange(len(self.tokens))))

    def die(self):
        """The system closes a dead process's files, which gives its locks back, and frees what it had wired."""
        self.ledger._forget()
        self.limit = 0


def play(folder, seed):
    """Processes start, wire, stop wiring, end and are killed at random steps; what is wired is looked at after each."""
    rng = random.Random(seed)
    processes = [Process(folder) for _ in range(3)]
    killed = 0
    for _ in range(10):
        one = rng.choice(processes)
        if rng.random() < 0.3:
            one.ledger.steps_to_live = rng.randrange(8)
        try:
            one.enter(rng.randrange(1, CAP)) if rng.random() < 0.6 else one.leave(rng)
        except KilledError:
            one.die()
            processes[processes.index(one)] = Process(folder)
            killed += 1
        one.ledger.steps_to_live = float("inf")
        assert sum(process.limit for process in processes) <= CAP, seed
        for process in processes:
            assert process.limit <= process.ledger._written, seed
    for process in processes:
        while process.tokens:
            process.leave(rng)
        assert process.limit == process.ledger._written == 0, seed
    fresh = Ledger(folder)
    assert fresh.claim(CAP, CAP) == CAP, seed
    fresh._forget()
    for process in processes:
        process.die()
    return killed


def test_random_interleavings_of_processes_and_kills_never_wire_too_much_and_leak_nothing(tmp_path):
    assert sum(play(tmp_path, seed) for seed in range(1000)) > 1000
    assert len(list(tmp_path.iterdir())) <= 8  # the lock, and entries of the dead that the next claim clears away


@pytest.mark.slow
def test_ten_thousand_more(tmp_path):
    assert sum(play(tmp_path, seed) for seed in range(1000, 11_000)) > 10_000


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A folder to meet in, and this process's ledger in it."""
    own = Ledger(tmp_path / "wired")
    monkeypatch.setattr(context, "ledger", own)
    monkeypatch.setattr(machine, "ledger", own)
    yield tmp_path / "wired"
    own._forget()


def test_a_block_gets_what_others_leave(shared, monkeypatch):
    metal = MetalStandIn().install(monkeypatch)
    other = Ledger(shared)
    assert other.claim(30 * GIB, CAP) == 30 * GIB
    with mt.wired_limit(24 * GIB, share=True) as wired:
        assert wired.applied
        assert wired.limit_bytes == metal.limit == 18 * GIB
        assert "of the 51.5 GB that all processes together may wire, others have: process" in wired.reason
        assert other.others() == [Share(os.getpid(), 18 * GIB)]
    assert metal.limit == 0
    assert other.others() == []
    other.settle(0)
    with mt.wired_limit(24 * GIB, share=True) as wired:
        assert (wired.limit_bytes, wired.reason) == (24 * GIB, "")
    other._forget()


def test_once_shared_every_block_of_the_process_is_entered(shared, monkeypatch):
    MetalStandIn().install(monkeypatch)
    other = Ledger(shared)
    with mt.wired_limit(8 * GIB, share=True), mt.wired_limit(8 * GIB):
        assert other.others() == [Share(os.getpid(), 16 * GIB)]


def test_where_nothing_is_left_nothing_is_wired_and_the_block_runs(shared, monkeypatch):
    metal = MetalStandIn().install(monkeypatch)
    other = Ledger(shared)
    other.claim(CAP, CAP)
    wired = mt.wired_limit("1GB", share=True)
    with pytest.warns(RuntimeWarning, match="Nothing is wired: of the"):
        wired.__enter__()
    wired.__exit__(None, None, None)
    assert not wired.applied
    assert f"process {os.getpid()} 51.5 GB" in wired.reason
    assert metal.calls == []
    other._forget()


def test_a_process_that_holds_the_lock_for_ever_is_not_waited_for(shared, monkeypatch):
    MetalStandIn().install(monkeypatch)
    monkeypatch.setattr(ledger, "_PAUSE", 0)
    shared.mkdir()
    stuck = os.open(shared / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(stuck, fcntl.LOCK_EX)
    with pytest.warns(RuntimeWarning, match="another process has held"), mt.wired_limit("1GB", share=True) as wired:
        assert not wired.applied
    assert machine.wired_shares.run().status == "skip"
    os.close(stuck)


def test_an_entry_that_could_not_be_lowered_stays_too_large_and_is_lowered_later(shared, monkeypatch, caplog):
    monkeypatch.setattr(ledger, "_PAUSE", 0)
    own, other = Ledger(shared), Ledger(shared)
    own.claim(30, CAP)
    stuck = os.open(shared / "lock", os.O_RDWR)
    fcntl.flock(stuck, fcntl.LOCK_EX)
    own.settle(0)
    assert "still take this one to wire 30 bytes" in caplog.text
    os.close(stuck)
    assert other.others() == [Share(os.getpid(), 30)]
    own.settle(0)
    assert other.others() == []
    own._forget()


def test_a_folder_that_is_somebody_elses_is_not_used(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "wired").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError, match="not this user's own folder"):
        Ledger(tmp_path / "wired").claim(1, 1)


def test_a_folder_that_was_cleared_is_made_again(shared):
    own, other = Ledger(shared), Ledger(shared)
    own.claim(30, CAP)
    for path in shared.iterdir():
        path.unlink()
    own.claim(40, CAP)
    assert other.others() == [Share(os.getpid(), 40)]
    own._forget()


HOLD = """
import sys, time
from pathlib import Path
from mlx_tune.wiring.ledger import Ledger
own = Ledger(Path(sys.argv[1]))
print(own.claim(int(sys.argv[2]), int(sys.argv[3])), flush=True)
sys.stdin.read()
"""


def started(folder, wanted):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(wanted), str(CAP)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_a_killed_process_counts_no_more(shared):
    with started(shared, 40 * GIB) as first, started(shared, 40 * GIB) as second:
        granted = [int(process.stdout.readline()) for process in (first, second)]
        assert sorted(granted) == [8 * GIB, 40 * GIB]
        look = Ledger(shared)
        assert {share.pid: share.wired_bytes for share in look.others()} == dict(
            zip((first.pid, second.pid), granted, strict=True)
        )
        report = machine.wired_shares.run(ram=64 * GIB)
        assert report.status == "warn"
        assert f"process {first.pid}" in report.summary
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert [share.pid for share in look.others()] == [second.pid]
        second.stdin.close()
        second.wait()
        assert look.others() == []
    assert machine.wired_shares.run().summary == "no process has entered that it wires memory"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12 and later, where threads run
def test_a_child_that_was_forked_is_a_process_of_its_own(shared):
    own = Ledger(shared)
    own.claim(10, CAP)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"%d" % own.claim(5, CAP))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 20) == b"5"
    assert Ledger(shared).others() == [Share(os.getpid(), 10)]
    own._forget()


def test_processes_meet_in_one_folder_of_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert ledger.ledger_folder() == tmp_path / f"mlx-tune-wired-{os.getuid()}"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "confstr", {65537: "/var/folders/x/T/"}.get)
    assert str(ledger.ledger_folder()) == f"/var/folders/x/T/mlx-tune-wired-{os.getuid()}"
