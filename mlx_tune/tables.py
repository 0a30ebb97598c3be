"""Text tables: what `str(result)` is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_NUMBER_STARTS = frozenset("0123456789+-.<>~")


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
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"A row of {len(row)} cells under {len(columns)} headings: {row}")
    widths = [max(len(columns[i]), *(len(row[i]) for row in cells), 0) for i in range(len(columns))]
    right = [
        any(row[i] for row in cells) and all(not row[i] or row[i][0] in _NUMBER_STARTS for row in cells)
        for i in range(len(columns))
    ]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    lines = [title] if title else []
    lines += [line(list(columns)), "  ".join("-" * w for w in widths)]
    lines += [line(row) for row in cells]
    lines += list(notes)
    return "\n".join(lines)
