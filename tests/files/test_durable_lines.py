"""Lines that are in a file whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import mlx_tune as mt
from mlx_tune.files.durable_lines import append_line, read_objects


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert read_objects(path) == []
    for line in ('{"a": 1}\n', '{"b": [2]}\n'):
        append_line(path, line, "The lines", "Go elsewhere.")
    assert read_objects(path) == [{"a": 1}, {"b": [2]}]


@pytest.mark.parametrize("torn", ["{", '{"b": 2}', "\0\0\0"])
def test_a_torn_end_is_cut_and_the_next_line_stands_on_its_own(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n' + torn)
    assert read_objects(path) == [{"a": 1}]
    append_line(path, '{"c": 3}\n', "The lines", "Go elsewhere.")
    assert read_objects(path) == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize(("line", "said"), [("[1]", "line 2 of"), ("nonsense", "Expecting value")])
def test_other_lines_are_no_journal(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "lines"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=said):
        read_objects(path)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append_line(path, "one\n", "The lines", "Go elsewhere.")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(mt.DiskError, match=r"The lines has to be written.*No space left.*Go elsewhere"):
        append_line(path, "two\n", "The lines", "Go elsewhere.")
    assert path.read_text() == "one\n"
