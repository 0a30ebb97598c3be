"""Reference outputs of a model, kept on disk until another one is compared with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_tune.files.scratch import ScratchFiles


class OutputStore(ScratchFiles):
    """A reference's outputs on disk, so that the reference itself need not stay in memory.

    Examples:
        >>> with OutputStore() as store:
        ...     store.put([mx.ones(2)])
        ...     [array.tolist() for array in store.get(0)]
        [[1.0, 1.0]]
    """

    def __init__(self) -> None:
        """Begin empty: the folder is made when something is put here."""
        super().__init__(
            "What the unquantized model gives for the evaluation",
            name="outputs",
            way_out="Evaluate on less, or set TMPDIR to a folder on a larger disk.",
        )
        self._files: list[Path] = []

    def put(self, arrays: list[mx.array]) -> None:
        """Write one batch's arrays after those before.

        Raises:
            DiskError: They cannot be written.
        """
        self._files.append(self.save({f"{i:03d}": array for i, array in enumerate(arrays)}))

    def get(self, i: int) -> list[mx.array]:
        """Read a batch's arrays back."""
        loaded: Any = mx.load(str(self._files[i]))
        return [loaded[name] for name in sorted(loaded)]

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._files)
