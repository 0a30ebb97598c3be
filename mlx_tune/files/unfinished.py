"""Folders under temporary names, which a process that is killed leaves behind and a later one clears away."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from mlx_tune.errors import InvalidArgumentError

#: How the names begin of folders in which something is made that is not whole yet.
UNFINISHED = ".unfinished-"

_LOCK, _CONTENTS = "in-use.lock", "contents"


@contextmanager
def beside(target: Path, *, instead: Path | None = None) -> Iterator[Path]:
    """A folder next to a place, to make something in that is then moved to the place as a whole.

    Args:
        target: The place; the folder above it is made where it is missing.
        instead: The path that errors have instead of the folder's, which nobody gave; the folder above the place by
            default.

    Yields:
        The folder. It and what is left in it are deleted afterwards.

    Raises:
        OSError: The folder cannot be made.

    Examples:
        >>> with beside(Path("report.txt")) as folder:
        ...     _ = (folder / "report.txt").write_text("all of it")
        ...     (folder / "report.txt").rename("report.txt")
        PosixPath('report.txt')
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with own_folder(target.parent, UNFINISHED) as folder:
        try:
            yield folder
        except Exception as error:
            _rename(error, str(folder), str(instead or target.parent))
            raise


class Resumable:
    """A folder beside a place that stays where work ends early, so that the next process goes on in it.

    It is deleted after a block that ends well, and after one that fails before it has set `worth_keeping`. One that is
    killed leaves it behind as it was.

    Args:
        target: The place, in which something is to stand as a whole once it is done.

    Attributes:
        folder: The folder; its name is that of the place with `.unfinished` after it.
        worth_keeping: True where an earlier process left something, or once this one has made what takes long.

    Raises:
        InvalidArgumentError: Another process is at work in it.

    Examples:
        >>> with Resumable(Path("model")) as work:
        ...     _ = (work.folder / "part").write_text("")
        >>> work.folder.exists()
        False
    """

    def __init__(self, target: Path) -> None:
        """Choose its name; it is made when the block begins."""
        self.folder = target.with_name(f"{target.name}.unfinished")
        self.worth_keeping = False
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Make the folder, or take it over from a process that has died."""
        while self._lock is None or not (self.folder / _LOCK).exists():
            if self._lock is not None:
                os.close(self._lock)  # its owner deleted it meanwhile
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                self._lock = None
                raise InvalidArgumentError(
                    f"Another process is at work in {str(self.folder)!r}: wait for it, or name another destination."
                ) from None
            except OSError:  # a disk without locks: then nobody else can lock it either
                break
        self.worth_keeping = any(entry.name != _LOCK for entry in self.folder.iterdir())
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Delete it, or say where it is."""
        if error is None or not self.worth_keeping:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not isinstance(error, InvalidArgumentError):
            error.add_note(
                f"What was done so far is in {str(self.folder)!r}: the same call goes on from there. Delete that "
                "folder to begin anew."
            )
        if self._lock is not None:
            os.close(self._lock)


@contextmanager
def own_folder(place: Path, prefix: str) -> Iterator[Path]:
    """Make a folder that only this process uses, and clear away those of processes that have died.

    It lies in an outer folder beside a file that is locked for as long as the block runs. The system takes the lock
    back when the process ends, however it ends, so that a file that can be locked belongs to nobody, and one that
    cannot is in use. A folder without that file is somebody else's, whatever its name.

    Args:
        place: Where to make it.
        prefix: The beginning of the outer folder's name, and of those of the folders that may be cleared.

    Yields:
        The inner folder, which is empty. Both are deleted afterwards, if they are still there.
    """
    for left in place.glob(f"{prefix}*"):
        with suppress(OSError):  # not one of ours, of another user, or already gone
            _delete_if_free(left)
    outer, lock = _made_and_locked(place, prefix)
    try:
        folder = outer / _CONTENTS
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        os.close(lock)


def _made_and_locked(place: Path, prefix: str) -> tuple[Path, int]:
    while True:
        outer = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        try:
            lock = os.open(outer / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            with suppress(OSError):  # a disk without locks: then nobody else can lock it either
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            shutil.rmtree(outer, ignore_errors=True)
            raise
        if (outer / _LOCK).exists():
            return outer, lock
        os.close(lock)  # another process took it for a dead one's before it was locked


def _delete_if_free(outer: Path) -> None:
    lock = os.open(outer / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(outer, ignore_errors=True)
    finally:
        os.close(lock)


def _rename(error: Exception, ours: str, given: str) -> None:
    """Let an error name the path that was given."""
    error.args = tuple(part.replace(ours, given) if isinstance(part, str) else part for part in error.args)
    if isinstance(error, OSError):
        for name in ("filename", "filename2"):
            if getattr(error, name, None) is not None:
                setattr(error, name, os.fsdecode(getattr(error, name)).replace(ours, given))
