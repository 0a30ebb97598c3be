"""Runs the examples: every `>>>` in a docstring, and every Python block in the documentation."""

from __future__ import annotations

import os

import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.sybil import SybilCollection

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub


@pytest.fixture(autouse=True)
def _own_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    """Pages and docstrings write files as a reader would: into a folder of their own."""
    if type(request.node).__name__ == "SybilItem":
        page = os.path.basename(str(request.node.path)).replace(".", "-")
        folder = tmp_path_factory.getbasetemp() / page
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)


docstrings = Sybil(
    name="docstrings",
    path="mlx_tune",
    parsers=[DocTestParser()],
    patterns=["*.py"],
    document_types={".py": PythonDocStringDocument},
    fixtures=["_own_folder"],
)
page_parsers = [PythonCodeBlockParser(), SkipParser()]
pages = Sybil(name="pages", path="docs", parsers=page_parsers, patterns=["*.md"], fixtures=["_own_folder"])
readme = Sybil(name="readme", parsers=page_parsers, filenames=["README.md"], fixtures=["_own_folder"])
pytest_collect_file = SybilCollection([docstrings, pages, readme]).pytest()
