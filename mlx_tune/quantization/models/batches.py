"""Reading what the user evaluates or calibrates on: token arrays, or whatever a model is called with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import mlx.core as mx

from mlx_tune.errors import QuantizationError

_INTEGERS = (mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64)


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of a model.

    Attributes:
        arguments: The positional arguments.
        tokens: The token array [batch, length] where that is all there is, else None.
        keywords: The arguments by name: a batch that is a dictionary.
    """

    arguments: tuple[Any, ...]
    tokens: mx.array | None
    keywords: Mapping[str, object] = field(default_factory=dict)

    @property
    def inputs(self) -> Batch:
        """The model's inputs: all but the last token of token batches, else the batch itself."""
        return self if self.tokens is None else Batch((self.shifted[0],), None)

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays among its arguments."""
        return [value for value in (*self.arguments, *self.keywords.values()) if isinstance(value, mx.array)]

    def call(
        self, function: Callable[..., object], *first: object, through: Callable[[object], Any] = lambda values: values
    ) -> Any:
        """Call a model, or a loss, with the batch.

        Args:
            function: Called with the positional arguments and those by name.
            *first: Arguments before them, such as the model for a loss.
            through: Applied first to the positional arguments, as a tuple, and to those by name, as a dictionary.

        Examples:
            >>> Batch((1,), None, {"scale": 2}).call(lambda x, scale: x * scale)
            2
        """
        return function(*first, *through(self.arguments), **through(dict(self.keywords)))

    @property
    def shifted(self) -> tuple[mx.array, mx.array]:
        """Inputs [batch, length - 1] and the tokens that follow them."""
        assert self.tokens is not None
        return self.tokens[:, :-1], self.tokens[:, 1:]


def read_batches(batches: Iterable[object] | None, name: str) -> list[Batch]:
    """Read all batches, in order.

    Args:
        batches: Token arrays [batch, length] or [length] of MLX or NumPy, or lists of tokens; or what a model is
            called with, a tuple being several arguments and a dictionary arguments by name. None for none.
        name: The argument that they came in, for errors.

    Raises:
        QuantizationError: No batches, or one that cannot be used.

    Examples:
        >>> import numpy as np
        >>> [b.tokens.shape for b in read_batches([np.zeros((2, 9), dtype=np.uint16)], "evaluation")]
        [(2, 9)]
    """
    if batches is None:
        return []
    if isinstance(batches, (mx.array, str, bytes, dict)) or not isinstance(batches, Iterable):
        raise QuantizationError(
            f"{name} must be a list or another iterable of batches, not one {type(batches).__name__}. "
            f"Write {name}=[tokens] with tokens of shape [batch, length]."
        )
    if hasattr(batches, "dtype"):
        raise QuantizationError(
            f"{name} must be a list or another iterable of batches, not one array. Write {name}=[tokens]."
        )
    read = [_read(batch, f"{name}[{i}]") for i, batch in enumerate(batches)]
    if not read:
        raise QuantizationError(f"{name} holds no batches: a generator that was used up before, perhaps.")
    return read


def token_rows(batches: list[Batch]) -> list[Any]:
    """The token arrays as NumPy; empty unless every batch is one."""
    import numpy as np

    if any(batch.tokens is None for batch in batches):
        return []
    return [np.array(batch.tokens) for batch in batches]


def count_tokens(batches: list[Batch]) -> int:
    """Predicted tokens in token batches; other batches count none."""
    return sum(b.tokens.shape[0] * (b.tokens.shape[1] - 1) for b in batches if b.tokens is not None)


def _read(batch: object, where: str) -> Batch:
    if batch is None or isinstance(batch, (str, bytes)):
        raise QuantizationError(
            f"{where} is {'None' if batch is None else 'text'}: batches are token arrays or what the model is called "
            "with. `mlx_tune.lm.token_batches` makes tokens of text."
        )
    if isinstance(batch, list) and batch and all(isinstance(a, Integral) and not isinstance(a, bool) for a in batch):
        batch = mx.array(batch)  # as tokenizers give them
    if isinstance(batch, dict) and batch and all(isinstance(name, str) for name in batch):
        return Batch((), None, {name: _array(value) for name, value in batch.items()})
    if isinstance(batch, dict):
        raise QuantizationError(f"{where} is a dictionary of no arguments by name: {sorted(map(repr, batch))}.")
    if isinstance(batch, (tuple, list)):
        arguments = tuple(_array(a) for a in batch)
        if not arguments:
            raise QuantizationError(f"{where} is empty.")
        if len(arguments) > 1 or not isinstance(arguments[0], mx.array):
            return Batch(arguments, None)
        batch = arguments[0]
    array = _array(batch)
    if not isinstance(array, mx.array):
        return Batch((array,), None)
    if array.dtype not in _INTEGERS or array.ndim > 2:
        return Batch((array,), None)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] < 2 or array.shape[0] < 1:
        raise QuantizationError(
            f"{where} has shape {list(array.shape)}: token arrays need [batch, length] with at least two tokens, "
            "the second being what the first is to predict."
        )
    # Embeddings take any integer type; int32 is what takes part in comparisons without surprises.
    return Batch((array,), array.astype(mx.int32))


def _array(value: Any) -> object:
    """NumPy arrays, and what else says its dtype, as MLX arrays; everything else as it is."""
    if hasattr(value, "__array__") and hasattr(value, "dtype") and not isinstance(value, mx.array):
        return mx.array(value)
    return value


def rows_at_most(batch: Batch, rows: int) -> Iterator[Batch]:
    """A token batch in parts of so many sequences."""
    assert batch.tokens is not None
    for start in range(0, batch.tokens.shape[0], rows):
        part = batch.tokens[start : start + rows]
        yield Batch((part,), part)


def in_parts(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Token batches cut between sequences into parts of at most so many tokens; other batches as they are.

    Args:
        batches: The batches.
        tokens: Predicted tokens of a part; a sequence that has more is a part of its own. A single part
            is cut into its sequences, so that one can be kept aside.

    Examples:
        >>> [b.tokens.shape for b in in_parts(read_batches([mx.zeros((4, 9), dtype=mx.int32)], "calibration"), 24)]
        [(2, 9), (2, 9)]
    """
    parts: list[Batch] = []
    for batch in batches:
        if batch.tokens is None:
            parts.append(batch)
        else:
            rows, length = batch.tokens.shape
            most = max(1, tokens // (length - 1))
            # As even as can be: of four sequences, three and one would make very different steps.
            parts += rows_at_most(batch, math.ceil(rows / math.ceil(rows / most)))
    return in_parts(batches, 1) if len(parts) == 1 and tokens > 1 else parts
