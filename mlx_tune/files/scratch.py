"""Files that wait on disk: where they go, and what is said where they cannot be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from mlx_tune.errors import DiskError
from mlx_tune.files.unfinished import own_folder
from mlx_tune.units import format_bytes

#: Disk that is left free for others.
SPARE_BYTES = 64 << 20

#: A way out where the folder is that of temporary files.
ELSEWHERE = "Set TMPDIR to a folder on a larger disk."

#: By which numbers and texts a system, MLX and the libraries in Rust refuse to write: full, over a quota, too large.
_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEXTS = re.compile(r"\[write\] Unable to write|\[save\w*\] Failed to open|No space left|os error (?:27|28|122)\)")


class ScratchFiles:
    """Arrays that wait on disk, in a folder of their own that is made when it is first needed.

    Args:
        what: The thing that waits there, as an error begins.
        name: Part of the folder's name.
        folder: Where to make it; `scratch_folder()` by default.
        way_out: The way out where there is too little room.

    Examples:
        >>> import mlx.core as mx
        >>> files = ScratchFiles("The example", name="example")
        >>> mx.load(str(files.save({"a": mx.ones(2)})))["a"].tolist()
        [1.0, 1.0]
        >>> files.close()
    """

    def __init__(
        self, what: str, *, name: str, folder: str | os.PathLike[str] | None = None, way_out: str = ELSEWHERE
    ) -> None:
        """Note where files would go; nothing is made yet."""
        self._what, self._name, self._wanted, self._way_out = what, name, folder, way_out
        self._folder: Path | None = None
        self._kept = ExitStack()
        self._count = 0

    @property
    def place(self) -> Path:
        """The folder in which this one's own is made."""
        return scratch_folder() if self._wanted is None else Path(self._wanted)

    def reserve(self, needed_bytes: int) -> None:
        """See that so many bytes would fit.

        Raises:
            DiskError: They would not.
        """
        with writing(self.place, self._what, needed_bytes=needed_bytes, way_out=self._way_out):
            pass

    def save(self, arrays: dict[str, Any]) -> Path:
        """Write arrays to a file of their own.

        Raises:
            DiskError: There is no room, or the system refuses; nothing stays behind.
        """
        import mlx.core as mx

        needed, place = sum(array.nbytes for array in arrays.values()), self.place
        with writing(place, self._what, needed_bytes=needed, way_out=self._way_out):
            if self._folder is None:
                self._folder = self._kept.enter_context(own_folder(place, f"mlx_tune-{self._name}-"))
            file = self._folder / f"{self._count}.safetensors"
            try:
                mx.save_safetensors(str(file), arrays)
            except BaseException:
                file.unlink(missing_ok=True)
                raise
        self._count += 1
        return file

    def close(self) -> None:
        """Delete everything."""
        self._kept.close()
        self._folder = None

    def __enter__(self) -> Self:
        """Return itself: the folder is made when something is saved."""
        return self

    def __exit__(self, *_: object) -> None:
        """Delete everything."""
        self.close()


@contextmanager
def writing(
    folder: str | os.PathLike[str], what: str, *, needed_bytes: int | None = None, way_out: str = ELSEWHERE
) -> Iterator[None]:
    """See that there is room before the block, and say what was refused where the block finds out that there is none.

    Args:
        folder: Where it writes.
        what: The thing that it writes, as the error begins, such as "The journal".
        needed_bytes: The size, where that is known.
        way_out: The way out, as a sentence.

    Raises:
        DiskError: Too little room, or the system refused to write there. Other errors pass.

    Examples:
        >>> with writing("/tmp", "A large file", needed_bytes=10**18):  # doctest: +ELLIPSIS
        ...     pass
        Traceback (most recent call last):
            ...
        mlx_tune.errors.DiskError: A large file takes 1000 PB on disk, and /tmp has ... free. Set TMPDIR to a ...
    """
    free = free_bytes(folder)
    if needed_bytes is not None and needed_bytes + SPARE_BYTES > free:
        raise _error(folder, what, needed_bytes, free, "", way_out)
    try:
        yield
    except Exception as error:
        if not _refused(error, Path(folder)):
            raise
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split()).rstrip(".")
        raise _error(folder, what, needed_bytes, free_bytes(folder), reason, way_out) from error


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """The room on the disk on which a folder lies, or would lie if it were made."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def scratch_folder(mounts: Path = Path("/proc/self/mounts"), spare: Path = Path("/var/tmp")) -> Path:
    """Where temporary files go that are written to free memory: a folder on a disk, if there is one.

    Many Linux systems keep `/tmp` in memory, where such files would take what they were to free. There it is
    `/var/tmp`, unless `TMPDIR` says otherwise.

    Args:
        mounts: The file that lists what is mounted where.
        spare: The folder to take instead.

    Raises:
        DiskError: No folder for temporary files can be written to.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # it has tried to write to each
        raise DiskError(f"No folder can hold temporary files: {error.strerror}. {ELSEWHERE}") from error
    chosen = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    usable = spare.is_dir() and os.access(spare, os.W_OK) and not in_memory(spare, mounts)
    return spare if not chosen and usable and in_memory(folder, mounts) else folder


def in_memory(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """True where a folder's files lie in memory, as far as the system says.

    Args:
        folder: Any folder.
        mounts: The file that lists what is mounted where.
    """
    if not mounts.is_file():
        return False
    kinds = dict(line.split()[1:3] for line in mounts.read_text().splitlines() if len(line.split()) > 2)
    # The last mount on a place hides those before it, and the nearest place above the folder decides.
    place = folder.resolve()
    return next((kinds[str(p)] for p in (place, *place.parents) if str(p) in kinds), "") in ("tmpfs", "ramfs")


def _refused(error: Exception, folder: Path) -> bool:
    """True where an error is one by which a write to the folder is refused."""
    if isinstance(error, DiskError):
        return False
    if isinstance(error, OSError):
        named = error.filename if isinstance(error.filename, str) else ""
        return error.errno in _NUMBERS or Path(named).is_relative_to(folder)
    return _TEXTS.search(str(error)) is not None


def _error(
    folder: str | os.PathLike[str], what: str, needed: int | None, free: int, reason: str, way_out: str
) -> DiskError:
    takes = f"takes {format_bytes(needed)} on disk" if needed is not None else "has to be written"
    text = f"{what} {takes}, and {os.fspath(folder)} has {format_bytes(free)} free."
    if reason:
        text += f" The system refused to write there: {reason}."
        if free > (needed or 0) + SPARE_BYTES:
            text += " A quota, or a limit on the size of files (`ulimit -f`), may be lower than what is free."
    return DiskError(f"{text} {way_out}", folder=os.fspath(folder), needed_bytes=needed, free_bytes=free)
