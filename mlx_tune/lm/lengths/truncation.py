"""The part of a data set that a training run leaves out, because rows are longer than it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_tune.lm.steps import Row, as_rows, row_of
from mlx_tune.units import format_count, whole_number


@dataclass(frozen=True)
class Truncation:
    """Rows that are cut at a length, and how much of them is.

    Attributes:
        max_length: Tokens of a row that are trained on at the most.
        rows: Rows of the data set.
        cut_rows: Those that are longer.
        tokens: Tokens of all rows.
        cut_tokens: Tokens beyond the length.
        longest: Tokens of the longest row.
    """

    max_length: int
    rows: int
    cut_rows: int
    tokens: int
    cut_tokens: int
    longest: int

    def __str__(self) -> str:
        """A sentence.

        Examples:
            >>> print(Truncation(max_length=8, rows=3, cut_rows=1, tokens=20, cut_tokens=2, longest=10))
            1 of 3 rows cut at 8 tokens: 2 of 20 tokens (10.0 %) are left out; the longest row has 10
        """
        if not self.cut_rows:
            return f"no row cut: the longest has {format_count(self.longest, 'token')}"
        return (
            f"{self.cut_rows:,} of {format_count(self.rows, 'row')} cut at {format_count(self.max_length, 'token')}: "
            f"{self.cut_tokens:,} of {format_count(self.tokens, 'token')} ({self.cut_tokens / self.tokens:.1%})"
            f" are left out; the longest row has {self.longest:,}"
        ).replace("%)", " %)")


def truncation(dataset: object, max_length: int) -> Truncation:
    """Count what mlx-lm's trainer cuts off a data set's rows.

    Every row is tokenized for that, as the trainer does before its first batch; it keeps them.

    Args:
        dataset: A data set for mlx-lm's trainer, or any sequence of `(tokens, offset)`.
        max_length: mlx-lm's `max_seq_length`.

    Raises:
        InvalidArgumentError: The data set is empty, or `max_length` is no positive whole number.

    Examples:
        >>> truncation([([1, 2, 3], 0), ([1], 0)], 2).cut_tokens
        1
    """
    most = whole_number(max_length, "max_length", least=1)
    rows: Sequence[Row] = as_rows(dataset)
    lengths = [len(row_of(rows[i])[0]) for i in range(len(rows))]
    over = [length - most for length in lengths if length > most]
    return Truncation(most, len(lengths), len(over), sum(lengths), sum(over), max(lengths))
