"""Where a subcommand's words go: results to standard output, everything else to standard error, files whole."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_tune.errors import BudgetError, DiskError, InvalidArgumentError
from mlx_tune.files.scratch import writing
from mlx_tune.files.unfinished import beside
from mlx_tune.presentation.plain import Json
from mlx_tune.presentation.tables import fit_to, fold


class Result(Protocol):
    """Something to print, as text or as JSON."""

    def to_dict(self) -> dict[str, Json]:
        """All of it, ready for JSON."""


@contextlib.contextmanager
def quiet_output(quiet: bool = True) -> Iterator[None]:
    """Send what libraries print to standard error, so that standard output holds the result alone."""
    if not quiet:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield


def is_first_rank() -> bool:
    """True where this process is the one of `mlx.launch` that prints and writes files; alone it always is."""
    import mlx.core as mx

    return mx.distributed.init().rank() == 0


def print_result(result: Result, *, as_json: bool) -> None:
    """Print a result the way that was asked for."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    print(folded(result))


def folded(result: object) -> str:
    """The text of a result, tables and all, with no line wider than the terminal, where its words allow that."""
    with fit_to(columns()):
        text = str(result)
    return fold(text, columns())


def command_lines(words: Sequence[str], indent: str = "  ") -> str:
    """A command to copy, continued with backslashes where it is wider than the terminal."""
    parts: list[str] = []
    for word in map(shlex.quote, words):
        if parts and parts[-1].startswith("-") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {word}"  # an option stays with its value
        else:
            parts.append(word)
    lines = [indent]
    for word in parts:
        last = lines[-1]
        if last.strip() and len(last) + len(word) + 3 > columns():
            lines[-1] = f"{last.rstrip()} \\"
            lines.append(f"{indent}    ")
        lines[-1] += f"{word} "
    return "\n".join(line.rstrip() for line in lines)


def columns() -> int:
    """Columns of the terminal; 80 where there is none, or as many as `COLUMNS` says."""
    return shutil.get_terminal_size().columns


def print_too_large(error: BudgetError, arguments: argparse.Namespace) -> None:
    """Say that something does not fit: as JSON on standard output where that was asked for, else as a line."""
    text = " ".join(str(error).split())
    if not is_first_rank():
        return
    if arguments.json:
        answer = {"fits": False, "needed_bytes": error.needed_bytes, "budget_bytes": error.budget_bytes}
        print(json.dumps({**answer, "message": text}, indent=2))
    else:
        print(text, file=sys.stderr)


def check_picture(path: str | None) -> None:
    """See before the work that a picture can be drawn to a path; None passes.

    Raises:
        InvalidArgumentError: An ending that stands for no format, or no place to write to.
    """
    if path is not None and Path(path).suffix.lower() not in (".svg", ".png"):
        raise InvalidArgumentError(f"--plot {path!r}: the name must end in .svg or .png.")
    check_place("--plot", path)


def check_place(option: str, path: str | os.PathLike[str] | None) -> None:
    """See before the work that a file or folder can be made at a path; None passes.

    Raises:
        InvalidArgumentError: A file is in the way, or the folder cannot be written to.
    """
    if path is None:
        return
    above = Path(path).absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"{option} {str(path)!r}: {str(above)!r} is no folder that can be written to.")


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file that is either whole or not there.

    Raises:
        InvalidArgumentError: The place cannot be written to.
        DiskError: The disk is full.
    """
    target = Path(path)
    try:
        with (
            beside(target) as folder,
            writing(target.parent, str(target), way_out="Name a file on another disk."),
        ):
            made = folder / target.name
            made.write_text(text, encoding="utf-8")
            os.replace(made, target)
    except DiskError:
        raise
    except OSError as error:
        raise InvalidArgumentError(f"{str(target)!r} cannot be written: {error.strerror}.") from None


def save_plot(result: Any, path: str | None) -> None:
    """Draw a result into a file that is either whole or not there, where one is named; the first rank does."""
    if path is None or not is_first_rank():
        return
    target = Path(path)
    with beside(target) as folder:
        result.plot(folder / target.name)
        os.replace(folder / target.name, target)
    print(f"picture in {path}", file=sys.stderr)
