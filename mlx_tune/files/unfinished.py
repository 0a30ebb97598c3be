"""Folders under temporary names, which a process that is killed leaves behind and a later one clears away."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
