"""Files of lines that are there for certain once they are written, each whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from mlx_tune.files.scratch import writing


def append_line(path: Path, text: str, what: str, way_out: str) -> None:
    r"""Write a line at the end of a file, and wait until the disk has it.

    Args:
        path: The file; made where there is none.
        text: The line with its newline.
        what: The file, as an error begins.
        way_out: The way out where there is no room.

    Raises:
        DiskError: There is none. The file is what it was.

    Examples:
        >>> append_line(Path("lines"), "one\n", "The example", "Write less.")
        >>> Path("lines").read_text()
        'one\n'
    """
    line = text.encode()
    with (
        writing(path.parent, what, needed_bytes=None, way_out=way_out),
        path.open("ab", buffering=0) as file,
    ):
        before = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())  # the next step may take the machine down
        except OSError:
            file.truncate(before)  # or the next line would go on from half of this one
            raise


def read_objects(path: Path) -> list[dict[str, Any]]:
    r"""The JSON objects on a file's lines; an end that was torn off while it was written is cut from the file.

    Args:
        path: The file; none counts as empty.

    Raises:
        ValueError: A line other than the last is no object.

    Examples:
        >>> _ = Path("objects").write_text('{"a": 1}\n{"b"')
        >>> read_objects(Path("objects")), Path("objects").read_text()
        ([{'a': 1}], '{"a": 1}\n')
    """
    if not path.exists():
        return []
    *lines, end = path.read_bytes().split(b"\n")
    if end:
        os.truncate(path, path.stat().st_size - len(end))
    objects = []
    for number, line in enumerate(lines, start=1):
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"line {number} of {path} is no object")
        objects.append(found)
    return objects
