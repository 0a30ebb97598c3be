"""Arrays that are wanted again, such as what layers are given: in memory as far as there is room, on disk beyond."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_tune.files.scratch import ScratchFiles, free_bytes


class KeptArrays(ScratchFiles):
    """Arrays by keys.

    Args:
        room_bytes: The most that is kept in memory.

    Examples:
        >>> with KeptArrays(room_bytes=8) as kept:
        ...     kept["a"], kept["b"] = mx.ones(2), mx.zeros(2)
        ...     kept.on_disk_bytes, kept["a"].tolist(), kept["b"].tolist()
        (8, [1.0, 1.0], [0.0, 0.0])
    """

    def __init__(self, room_bytes: int) -> None:
        """Begin empty: a folder is made when the room in memory is full."""
        super().__init__(
            "What layers are given for the calibration",
            name="activations",
            way_out="Set TMPDIR to a folder on a larger disk, or calibrate on less.",
        )
        self._room = room_bytes
        self._held: dict[Hashable, mx.array] = {}
        self._files: dict[Hashable, tuple[Path, int]] = {}
        self.on_disk_bytes = 0

    def room_bytes(self, *, on_disk: bool) -> int:
        """The bytes that there is room for, in memory, and on disk if that counts: half of what is free there."""
        return self._room + (free_bytes(self.place) // 2 if on_disk else 0)

    def __setitem__(self, key: Hashable, array: mx.array) -> None:
        """Keep an array, instead of the one that had its key.

        Raises:
            DiskError: It cannot be written.
        """
        self.discard(key)
        if array.nbytes <= self._room:
            mx.eval(array)
            self._room -= array.nbytes
            self._held[key] = array
        else:
            self._files[key] = self.save({"array": array}), array.nbytes
            self.on_disk_bytes += array.nbytes

    def __getitem__(self, key: Hashable) -> mx.array:
        """The array with a key.

        Raises:
            KeyError: There is none.
        """
        if key in self._held:
            return self._held[key]
        loaded: Any = mx.load(str(self._files[key][0]))
        array: mx.array = loaded["array"]
        return array

    def discard(self, key: Hashable) -> None:
        """Forget an array, if there is one with this key."""
        if key in self._held:
            self._room += self._held.pop(key).nbytes
        elif key in self._files:
            file, size = self._files.pop(key)
            file.unlink()
            self.on_disk_bytes -= size
