"""Text for the demonstration."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A dozen of the standard library's modules."""
    folder = tmp_path_factory.mktemp("text")
    for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:24]:
        (folder / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return folder
