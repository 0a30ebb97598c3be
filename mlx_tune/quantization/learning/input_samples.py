"""Rows of what layers are given, kept on disk, to hold a layer's outputs against those of its unquantized weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_tune.files.scratch import ScratchFiles
from mlx_tune.measuring.float32_products import matmul_float32
from mlx_tune.units import number

#: Rows of each layer's inputs that are kept.
ROWS = 512

#: Rows of weights whose outputs are looked at together.
_OUTPUTS_AT_ONCE = 4096

#: Returns packed arrays' weights in float32, for these rows.
Unpack = Callable[[slice], mx.array]


class InputSamples(ScratchFiles):
    """Rows spread over what each layer is given.

    Args:
        batches: The number of batches that will be run, among which the rows are divided.

    Examples:
        >>> with InputSamples(batches=1) as samples:
        ...     samples.add("head", mx.ones((1024, 8)))
        ...     samples.read("head").shape
        (512, 8)
    """

    def __init__(self, batches: int) -> None:
        """Begin empty: a folder is made when something is added."""
        self._each = max(1, ROWS // max(1, batches))
        self._files: dict[str, list[Path]] = {}
        super().__init__(
            "A sample of what layers are given for the calibration",
            name="inputs",
            way_out="Set TMPDIR to a folder on a larger disk, or calibrate on less.",
        )

    def add(self, path: str, inputs: mx.array) -> None:
        """Keep some rows of `inputs`, `[rows, columns]`, as what the layer at `path` was given.

        Raises:
            DiskError: They cannot be written.
        """
        files = self._files.setdefault(path, [])
        if len(files) * self._each < ROWS:
            step = max(1, inputs.shape[0] // self._each)
            files.append(self.save({"rows": mx.contiguous(inputs[::step][: self._each])}))

    def read(self, path: str) -> mx.array | None:
        """The rows of one layer, `[rows, columns]` in float32, or None where it was given none."""
        files = self._files.get(path)
        if not files:
            return None
        loaded: list[Any] = [mx.load(str(file)) for file in files]
        return mx.concatenate([arrays["rows"].astype(mx.float32) for arrays in loaded])

    def reader(self, path: str) -> Callable[[], mx.array | None]:
        """A function that reads the rows of one layer."""
        return partial(self.read, path)


def sampled_output_error(inputs: mx.array, weight: mx.array, after: Unpack, *, lookups: bool) -> float:
    """Squared error of a layer's outputs over their squares, on rows of what it is given.

    Args:
        inputs: The rows, `[rows, columns]`.
        weight: The layer's weights, `[outputs, columns]`.
        after: The stand-in for them.
        lookups: Add the relative squared error of the weights themselves, as for an embedding that is a head as well.

    Returns:
        The ratio; 0 where the outputs are 0.

    Examples:
        >>> w = mx.ones((2, 32))
        >>> round(sampled_output_error(w, w, lambda rows: 1.1 * w[rows], lookups=False), 4)
        0.01
    """
    # Squares of very large or small numbers leave float32's range.
    unit = mx.maximum(mx.abs(weight).max().astype(mx.float32), 1e-30)
    inputs = inputs / mx.maximum(mx.abs(inputs).max(), 1e-30)
    error = outputs = lost = weights = 0.0
    for start in range(0, weight.shape[0], _OUTPUTS_AT_ONCE):
        rows = slice(start, start + _OUTPUTS_AT_ONCE)
        before = weight[rows].astype(mx.float32)
        change, before = (before - after(rows)) / unit, before / unit
        error += number(mx.square(matmul_float32(inputs, change.T)).sum())
        outputs += number(mx.square(matmul_float32(inputs, before.T)).sum())
        lost += number(mx.square(change).sum())
        weights += number(mx.square(before).sum())
    share = error / outputs if outputs else 0.0
    return share + (lost / weights if lookups and weights else 0.0)
