"""The bytes that each process of a user wires, so that together they stay below what the machine may wire.

Several servers that wire three quarters of a Mac each freeze it (mlx-lm#883, mlx-lm#1252, mlx-lm#1666): a limit is one
process's own, and none sees the others'. Processes that share write what they wire into a file each, in one folder of
the user's. A process locks its file for as long as it lives; the system takes the lock back when it ends, however it
ends, so that a file that can be locked belongs to nobody and does not count.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

_LOCK = "lock"
#: Attempts at the folder's lock, which is held for a fraction of a millisecond, and the seconds between them.
_ATTEMPTS, _PAUSE = 200, 0.005
#: `confstr`'s number for the folder that macOS gives each user for temporary files, whatever TMPDIR says.
_DARWIN_USER_TEMP_DIR = 65537


@dataclass(frozen=True)
class Share:
    """The part of one process.

    Attributes:
        pid: The process.
        wired_bytes: The most that it may wire at present.
    """

    pid: int
    wired_bytes: int


def ledger_folder() -> Path:
    """The folder in which this user's processes meet, the same for all of them."""
    if sys.platform == "darwin":
        base = os.confstr(_DARWIN_USER_TEMP_DIR) or "/tmp"
    else:
        base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"mlx-tune-wired-{os.getuid()}"


class Ledger:
    """This process's entry, and the sight of the others'.

    What an entry says is never less than what its process may wire: it is raised before the limit is, and lowered
    after it.

    Args:
        folder: Where processes meet; `ledger_folder()` by default.

    Attributes:
        active: True once this process has shared: from then on everything it wires is entered.
        seen: The shares of others that left room for less than the last claim; empty where they did not.

    Examples:
        >>> one, other = Ledger(Path("meeting")), Ledger(Path("meeting"))
        >>> one.claim(30, cap_bytes=40), other.claim(30, cap_bytes=40)
        (30, 10)
        >>> one.settle(0)
        >>> other.claim(30, cap_bytes=40)
        30
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Enter nothing yet."""
        self._folder = folder
        self.active = False
        self.seen: tuple[Share, ...] = ()
        self._own: tuple[Path, int] | None = None  # the entry, and its locked file
        self._written = 0
        self._inside = False
        forget = weakref.WeakMethod(self._forget)
        os.register_at_fork(after_in_child=lambda: (method := forget()) and method())

    def claim(self, wanted_bytes: int, cap_bytes: int) -> int:
        """Enter what this process is about to wire, as far as the others leave room for it.

        Args:
            wanted_bytes: All that this process wants to wire.
            cap_bytes: The most that all together may wire.

        Returns:
            The most that this process may wire now: what it wants, or what is left.

        Raises:
            OSError: The folder cannot be used, or another process holds its lock for a second.
        """
        with self._locked() as folder:
            self.active = True
            others = self._others(folder)
            granted = max(0, min(wanted_bytes, cap_bytes - sum(share.wired_bytes for share in others)))
            self.seen = tuple(others) if granted < wanted_bytes else ()
            self._write(folder, max(granted, self._written))
            return granted

    def settle(self, limit_bytes: int) -> None:
        """Enter the limit that now holds for this process, which is no more than it has claimed."""
        if not self.active or self._inside or limit_bytes == self._written:
            return  # in the middle of a claim, the caller settles once that is done
        try:
            with self._locked() as folder:
                self._write(folder, limit_bytes)
        except OSError as error:  # what stands there is too much, which is safe; the next claim or end puts it right
            _log.warning("other processes still take this one to wire %d bytes: %s", self._written, error)

    def others(self) -> list[Share]:
        """The shares of other living processes, those that wire something.

        Raises:
            OSError: As for `claim`.
        """
        if not (self._folder or ledger_folder()).exists():
            return []
        with self._locked() as folder:
            return self._others(folder)

    @contextmanager
    def _locked(self) -> Iterator[Path]:
        """Hold the folder's lock, which processes take in turn for a moment."""
        folder = self._folder or ledger_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or folder.is_symlink():
            raise PermissionError(f"{folder} is not this user's own folder")
        lock = self._lock(folder / _LOCK)
        self._inside = True
        try:
            yield folder
        finally:
            self._inside = False
            os.close(lock)

    def _lock(self, path: Path) -> int:
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(path.stat(), os.fstat(lock)):
                    return lock  # else somebody cleared the folder while it was opened
            except BlockingIOError:
                pass
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
        raise TimeoutError(f"another process has held {path} for {_ATTEMPTS * _PAUSE:g} s")

    def _others(self, folder: Path) -> list[Share]:
        """The entries of living processes that wire something; those of dead ones are cleared away."""
        shares = []
        for path in folder.iterdir():
            if path.name == _LOCK or (self._own is not None and path == self._own[0]):
                continue
            entry = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                if wired := int(os.pread(entry, 20, 0) or b"0"):
                    shares.append(Share(int(path.name.partition("-")[0]), wired))
            finally:
                os.close(entry)
        return shares

    def _write(self, folder: Path, wired_bytes: int) -> None:
        if self._own is None or not self._own[0].exists():
            self._forget()
            path = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
            self._own = (path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            fcntl.flock(self._own[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(self._own[1], b"%020d" % wired_bytes, 0)  # one write of one length: never half of a number
        self._written = wired_bytes

    def _forget(self) -> None:
        """Let go of the entry: after a fork it is the parent's, and ends with the parent."""
        if self._own is not None:
            os.close(self._own[1])
        self._own, self._written, self._inside = None, 0, False


#: The one ledger of the process.
ledger = Ledger()
