"""What a model gave, kept on disk until another one is compared with it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_tune.devices import scratch_folder
from mlx_tune.errors import QuantizationError
from mlx_tune.units import format_bytes

#: Disk that is left free for others.
SPARE_BYTES = 64 << 20


class OutputStore:
    """A reference's outputs on disk, so that the reference itself need not stay in memory.

    Examples:
        >>> with OutputStore() as store:
        ...     store.put([mx.ones(2)])
        ...     [array.tolist() for array in store.get(0)]
        [[1.0, 1.0]]
    """

    def __init__(self) -> None:
        """Nothing is written yet."""
        self._folder: Path | None = None
        self._count = 0

    def __enter__(self) -> OutputStore:
        """Make the folder."""
        self._folder = Path(tempfile.mkdtemp(prefix="mlx_tune-outputs-", dir=scratch_folder()))
        return self

    def __exit__(self, *_: object) -> None:
        """Delete everything."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def reserve(self, size: int) -> None:
        """Find out whether so many bytes would fit.

        Args:
            size: Of everything that will be put here.

        Raises:
            QuantizationError: They would not.
        """
        assert self._folder is not None
        free = shutil.disk_usage(self._folder).free
        if size + SPARE_BYTES > free:
            raise QuantizationError(
                f"What the unquantized model gives for the evaluation takes {format_bytes(size)} on disk, and "
                f"{self._folder.parent} has {format_bytes(free)} free. Evaluate on less, or set TMPDIR to a folder on "
                "a larger disk."
            )

    def put(self, arrays: list[mx.array]) -> None:
        """Write one batch's arrays after those before."""
        assert self._folder is not None
        named = {f"{i:03d}": array for i, array in enumerate(arrays)}
        mx.save_safetensors(str(self._folder / f"{self._count}.safetensors"), named)
        self._count += 1

    def get(self, i: int) -> list[mx.array]:
        """Read a batch's arrays back."""
        assert self._folder is not None
        loaded: Any = mx.load(str(self._folder / f"{i}.safetensors"))
        return [loaded[name] for name in sorted(loaded)]

    def __len__(self) -> int:
        """How many batches it holds."""
        return self._count
