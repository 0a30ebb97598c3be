"""One progress line on standard error, so that standard output stays for results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """A progress line that is being shown, or, where progress is turned off, one that swallows updates."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        """Wrap rich's progress and the task in it; both None for a line that is not shown."""
        self._progress = progress
        self._task = task

    def update(self, *, completed: float | None = None, total: float | None = None, text: str | None = None) -> None:
        """Move the line on.

        Args:
            completed: How much is done, in the unit of `total`.
            total: A new total, when it turned out otherwise than expected.
            text: What is going on now, shown after the bar.
        """
        if self._progress is None or self._task is None:
            return
        fields = {} if text is None else {"text": text}
        self._progress.update(self._task, completed=completed, total=total, **fields)  # type: ignore[arg-type]

    def advance(self, by: float = 1) -> None:
        """Count `by` more as done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, by)


@contextmanager
def progress_bar(description: str, total: float | None = None, enabled: bool = True) -> Iterator[Bar]:
    """Show a progress line while the block runs.

    Args:
        description: What is done, at the start of the line.
        total: What counts as all of it; None where that is not known.
        enabled: False shows nothing (and imports nothing).

    Yields:
        The line, to be moved on with `update` and `advance`.

    Examples:
        >>> with progress_bar("counting", total=3, enabled=False) as bar:
        ...     for i in range(3):
        ...         bar.advance()
    """
    if not enabled:
        yield Bar(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        yield Bar(progress, progress.add_task(description, total=total, text=""))
