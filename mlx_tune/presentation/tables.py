"""Text tables: what `str(result)` is made of, and folding them to a terminal's width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import zip_longest

_NUMBER_STARTS = frozenset("0123456789+-.<>~")

#: Between columns.
_GAP = "  "

#: How wide tables may be; None for as wide as they are.
_width: ContextVar[int | None] = ContextVar("width of tables", default=None)


@contextmanager
def fit_to(width: int) -> Iterator[None]:
    """Fold every table that is rendered in the block to so many columns.

    Headings and texts are wrapped inside their columns; where that is not enough, the last column of text moves to
    lines of its own below its rows, and numbers part from their units. Words are never cut.

    Args:
        width: Columns of the terminal.

    Examples:
        >>> with fit_to(24):
        ...     print(render_table(["n", "remark"], [[1, "chosen, the largest that fits"]]))
        n  remark
        -  ---------------------
        1  chosen, the largest
           that fits
    """
    token = _width.set(width)
    try:
        yield
    finally:
        _width.reset(token)


def fold(text: str, width: int) -> str:
    """Wrap the lines of a text that are wider than so many columns, further lines indented like the first.

    Examples:
        >>> print(fold("  one two three", 10))
          one two
          three
    """
    lines = []
    for line in text.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        lines += [line] if len(line) <= width else _wrapped(line, width, indent)
    return "\n".join(lines)


def render_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    notes: Iterable[str] = (),
) -> str:
    """Lay rows out in columns as plain text.

    A column whose every non-empty cell starts like a number is aligned to the right. None is an empty cell.

    Args:
        columns: The headings.
        rows: The cells, as many to a row as there are headings; each is put through `str`.
        title: A line above.
        notes: Lines below, such as what was skipped and why.

    Returns:
        Lines without trailing space, no newline at the end.

    Raises:
        ValueError: A row that has more or fewer cells than there are headings.

    Examples:
        >>> print(render_table(["layer", "bytes"], [["up", 12], ["down", 3]]))
        layer  bytes
        -----  -----
        up        12
        down       3
    """
    cells = texts_of(columns, rows)
    right = numeric(columns, cells)
    width = _width.get()
    lines = _laid_out(list(columns), cells, right, width)
    words = [[title] if title else [], list(notes)]
    if width is not None:
        words = [fold("\n".join(part), width).splitlines() for part in words]
    return "\n".join([*words[0], *lines, *words[1]])


def texts_of(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[list[str]]:
    """Every cell as text.

    Raises:
        ValueError: A row that has more or fewer cells than there are headings.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"A row of {len(row)} cells under {len(columns)} headings: {row}")
    return cells


def numeric(columns: Sequence[str], cells: list[list[str]]) -> list[bool]:
    """For each column, whether it has cells that are not empty, and all of those start like numbers."""
    return [
        any(row[i] for row in cells) and all(not row[i] or row[i][0] in _NUMBER_STARTS for row in cells)
        for i in range(len(columns))
    ]


def _laid_out(columns: list[str], cells: list[list[str]], right: list[bool], width: int | None) -> list[str]:
    """The heading, the rule and the rows, folded where they are too wide."""
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    if width is None or _total(widths) <= width:
        return _lines(columns, cells, [""] * len(cells), right, widths)
    for numbers, last_below in ((False, False), (False, True), (True, True)):
        below = last_below and not right[-1] and len(columns) > 1
        kept = slice(None, -1 if below else None)
        narrow = _narrowed(columns[kept], [row[kept] for row in cells], right[kept], widths[kept], width, numbers)
        if _total(narrow) <= width or numbers:
            break
    remarks = [row[-1] if below else "" for row in cells]
    return _lines(columns[kept], [row[kept] for row in cells], remarks, right[kept], narrow, width)


def _narrowed(
    columns: list[str], cells: list[list[str]], right: list[bool], widths: list[int], width: int, numbers: bool
) -> list[int]:
    """Widths of columns, the widest taken from first, no narrower than what is in them can be broken."""
    least = []
    for i, name in enumerate(columns):
        inside = [row[i] for row in cells]
        longest = max((len(text) for text in inside), default=0) if right[i] and not numbers else _longest(inside)
        least.append(max(longest, _longest([name])))
    narrow = list(widths)
    while _total(narrow) > width:
        spare = [(narrow[i], i) for i in range(len(narrow)) if narrow[i] > least[i]]
        if not spare:
            break
        narrow[max(spare)[1]] -= 1
    return narrow


def _lines(
    columns: list[str],
    cells: list[list[str]],
    remarks: list[str],
    right: list[bool],
    widths: list[int],
    width: int | None = None,
) -> list[str]:
    def row_lines(texts: Sequence[str]) -> list[str]:
        if width is None:
            parts = [[text] for text in texts]
        else:
            parts = [_wrapped(text, w) for text, w in zip(texts, widths, strict=True)]
        return [
            _GAP.join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)).rstrip()
            for line in zip_longest(*parts, fillvalue="")
        ]

    lines = [*row_lines(columns), _GAP.join("-" * w for w in widths)]
    for row, remark in zip(cells, remarks, strict=True):
        lines += row_lines(row)
        if remark:
            lines += _wrapped(f"    {remark}", width or len(remark) + 4, "    ")
    return lines


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most so many characters, where words allow it."""
    if len(text) <= width:
        return [text]
    first = text[: len(text) - len(text.lstrip())]
    return textwrap.wrap(
        text.strip(),
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _longest(texts: Iterable[str]) -> int:
    return max((len(word) for text in texts for word in text.split()), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)
