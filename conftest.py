"""Runs the examples: every `>>>` in a docstring, and every Python block in the documentation."""

from __future__ import annotations

import gc
import os
from typing import Any

import mlx.core as mx
import pytest
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.sybil import SybilCollection

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one backend are skipped on another, with the reason."""
    metal, gpu = mx.metal.is_available(), mx.default_device() == mx.Device(mx.gpu)
    for item in items:
        if item.get_closest_marker("metal") and not metal:
            item.add_marker(pytest.mark.skip(reason="needs an Apple GPU: MLX has no Metal here"))
        if item.get_closest_marker("cpu_only") and gpu:
            item.add_marker(pytest.mark.skip(reason="asserts what only the CPU backend promises"))


@pytest.fixture(autouse=True)
def _own_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    """Pages and docstrings write files as a reader would: into a folder of their own."""
    if type(request.node).__name__ == "SybilItem":
        page = os.path.basename(str(request.node.path)).replace(".", "-")
        folder = tmp_path_factory.getbasetemp() / page
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)


def _begin(_: dict[str, Any]) -> None:
    """A page begins as a reader's script does: with nothing in memory, which the budgets on it count on."""
    gc.collect()
    mx.clear_cache()
    mx.random.seed(0)


def _end(namespace: dict[str, Any]) -> None:
    """What a page made ends with it: models in a page's namespace would count against the next page's budgets."""
    namespace.clear()


docstrings = Sybil(
    name="docstrings",
    path="mlx_tune",
    parsers=[DocTestParser()],
    patterns=["*.py"],
    document_types={".py": PythonDocStringDocument},
    fixtures=["_own_folder"],
    teardown=_end,
)
# No parser for skipping: a Python block that cannot run has no place on a page.
page_parsers = [PythonCodeBlockParser()]
page_options: dict[str, Any] = {"fixtures": ["_own_folder"], "setup": _begin, "teardown": _end}
pages = Sybil(name="pages", path="docs", parsers=page_parsers, patterns=["*.md"], **page_options)
readme = Sybil(name="readme", parsers=page_parsers, filenames=["README.md"], **page_options)
pytest_collect_file = SybilCollection([docstrings, pages, readme]).pytest()
