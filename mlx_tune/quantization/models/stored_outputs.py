"""Reference outputs of a model, kept on disk until another one is compared with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_tune.files.scratch import ScratchFiles


class OutputStore:
    """A reference's outputs on disk, so that the reference itself need not stay in memory.

    Examples:
        >>> with OutputStore() as store:
        ...     store.put([mx.ones(2)])
        ...     [array.tolist() for array in store.get(0)]
        [[1.0, 1.0]]
    """

    def __init__(self) -> None:
        """Begin empty: the folder is made when something is put here."""
        self._scratch = ScratchFiles(
            "What the unquantized model gives for the evaluation",
            name="outputs",
            way_out="Evaluate on less, or set TMPDIR to a folder on a larger disk.",
        )
        self._files: list[Path] = []

    def __enter__(self) -> OutputStore:
        """Return the store: the folder is made when something is put here."""
        return self

    def __exit__(self, *_: object) -> None:
        """Delete everything."""
        self._scratch.close()

    def reserve(self, size: int) -> None:
        """Find out whether so many bytes would fit.

        Args:
            size: Of everything that will be put here.

        Raises:
            DiskError: They would not.
        """
        self._scratch.reserve(size)

    def put(self, arrays: list[mx.array]) -> None:
        """Write one batch's arrays after those before.

        Raises:
            DiskError: They cannot be written.
        """
        self._files.append(self._scratch.save({f"{i:03d}": array for i, array in enumerate(arrays)}))

    def get(self, i: int) -> list[mx.array]:
        """Read a batch's arrays back."""
        loaded: Any = mx.load(str(self._files[i]))
        return [loaded[name] for name in sorted(loaded)]

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._files)
