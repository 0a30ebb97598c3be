"""A safetensors file of known contents that is filled array by array, so that no more than one is in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    import mlx.core as mx

#: The format's names of dtypes, by MLX's.
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}


class _Place(NamedTuple):
    """Where an array goes: its first byte in the file, its bytes, dtype and shape."""

    start: int
    nbytes: int
    dtype: mx.Dtype
    shape: tuple[int, ...]


class TensorFile:
    """A safetensors file that has its header and its full length from the beginning.

    A file that is there already, with the same header and length, is gone on with: what it holds stays.

    Args:
        path: The file.
        arrays: Its contents, by name. Only shapes and dtypes are looked at; nothing is evaluated.

    Attributes:
        path: The file.
        header: Its header, which says what it holds and where.

    Examples:
        >>> import mlx.core as mx
        >>> with TensorFile(Path("w.safetensors"), {"a": mx.zeros((2, 2)), "b": mx.zeros(3)}) as file:
        ...     file.write("b", mx.arange(3.0))
        ...     file.write("a", mx.ones((2, 2)))
        >>> loaded = mx.load("w.safetensors")
        >>> loaded["a"].tolist(), loaded["b"].tolist()
        ([[1.0, 1.0], [1.0, 1.0]], [0.0, 1.0, 2.0])
    """

    def __init__(self, path: Path, arrays: Mapping[str, mx.array]) -> None:
        """Work out where everything goes; the file itself is made by `open`."""
        self.path = path
        described: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        self._places: dict[str, _Place] = {}
        end = 0
        for name, array in arrays.items():
            start, end = end, end + array.nbytes
            self._places[name] = _Place(start, array.nbytes, array.dtype, array.shape)
            kind = _NAMES[str(array.dtype).rpartition(".")[2]]
            described[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        self.header = text.decode()
        self._header = len(text).to_bytes(8, "little") + text
        self._length = len(self._header) + end
        self._file: int | None = None

    @property
    def missing_bytes(self) -> int:
        """The bytes that the disk has to give for the file still; holes in it count as missing."""
        there = self.path.stat().st_blocks * 512 if self.path.exists() else 0
        return max(0, self._length - there)

    @property
    def is_whole(self) -> bool:
        """True where a file of this header and length is there."""
        if not self.path.exists() or self.path.stat().st_size != self._length:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self._header)) == self._header

    def open(self) -> None:
        """Make the file, unless it is there, and be ready to write."""
        if not self.is_whole:
            with self.path.open("wb") as file:
                file.write(self._header)
                file.truncate(self._length)
                os.fsync(file.fileno())
        self._file = os.open(self.path, os.O_WRONLY)

    def write(self, name: str, array: mx.array) -> None:
        """Write one array to its place.

        Args:
            name: Its name.
            array: Its values.

        Raises:
            ValueError: It has another shape or dtype than was said.
        """
        import mlx.core as mx

        place = self._places[name]
        if (array.shape, array.dtype) != (place.shape, place.dtype):
            raise ValueError(
                f"{name} is {array.dtype} {list(array.shape)}; the file has room for {place.dtype} {list(place.shape)}."
            )
        assert self._file is not None
        if not math.prod(place.shape):
            return
        values = memoryview(mx.contiguous(array).reshape(-1).view(mx.uint8))  # type: ignore[arg-type]
        written = 0
        while written < place.nbytes:
            written += os.pwrite(self._file, values[written:], len(self._header) + place.start + written)

    def flush(self) -> None:
        """Wait until the disk has what was written."""
        assert self._file is not None
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        """Open it."""
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
