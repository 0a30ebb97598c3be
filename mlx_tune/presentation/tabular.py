"""Results that are tables: text where they are printed, HTML where a notebook shows them, from the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mlx_tune.presentation.tables import numeric, render_table, texts_of


class Tabular:
    """A result that is read as a table, or several: as text where it is printed, as HTML where a notebook shows it."""

    def table(self) -> Table:
        """The table; a result of several has `tables` instead."""
        raise NotImplementedError

    def tables(self) -> Sequence[Table]:
        """Every table, in the order in which they are read."""
        return (self.table(),)

    def __str__(self) -> str:
        """The tables as plain text."""
        return "\n\n".join(str(table) for table in self.tables())

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return "\n".join(table.to_html() for table in self.tables())


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        columns: The headings.
        rows: The cells, as many to a row as there are headings. None is an empty cell.
        title: A line above.
        notes: Lines below.

    Examples:
        >>> print(Table(["layer", "bytes"], [["up", 12], ["down", 3]]))
        layer  bytes
        -----  -----
        up        12
        down       3
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str | None = None
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        """The table as plain text."""
        return render_table(self.columns, self.rows, title=self.title, notes=self.notes)

    def to_html(self) -> str:
        """The table as HTML, whatever its cells hold being text."""
        cells = texts_of(self.columns, self.rows)
        aligned = ["right" if right else "left" for right in numeric(self.columns, cells)]

        def row(tag: str, texts: Sequence[str]) -> str:
            inside = "".join(
                f'<{tag} style="text-align: {side}; white-space: pre-wrap">{escape(text)}</{tag}>'
                for side, text in zip(aligned, texts, strict=True)
            )
            return f"<tr>{inside}</tr>"

        above = "" if self.title is None else f"<caption>{_lines(self.title)}</caption>"
        below = "".join(f"<p>{_lines(note)}</p>" for note in self.notes)
        head, body = row("th", self.columns), "".join(row("td", texts) for texts in cells)
        return f"<table>{above}<thead>{head}</thead><tbody>{body}</tbody></table>{below}"


def _lines(text: str) -> str:
    """Text as HTML that keeps its lines."""
    return "<br>".join(escape(line) for line in text.splitlines())
