"""Runs the examples: every `>>>` in a docstring, and every Python block in the documentation."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from page_output import matches
from sybil import Document, Example, Region, Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.sybil import SybilCollection

from mlx_tune.garbage import quick_collections

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

# No generated test may depend on how busy the machine is.
hypothesis_settings.register_profile("any_speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("any_speed")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background deaf to Ctrl-C; the tests of interrupts send it to themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Active memory in bytes when garbage was last collected between tests.
settled = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one backend are skipped on another, with the reason."""
    metal, gpu = mx.metal.is_available(), mx.default_device() == mx.Device(mx.gpu)
    for item in items:
        if item.get_closest_marker("metal") and not metal:
            item.add_marker(pytest.mark.skip(reason="needs an Apple GPU: MLX has no Metal here"))
        if item.get_closest_marker("cpu_only") and gpu:
            item.add_marker(pytest.mark.skip(reason="asserts what only the CPU backend promises"))


@pytest.fixture(autouse=True)
def _no_garbage_of_others() -> None:
    """A test that counts memory begins with no arrays that an earlier one left in reference cycles.

    Collecting takes longer than most tests: only where memory has grown since it was last done.
    """
    global settled
    for name in ("last_exc", "last_value", "last_traceback"):  # of a failed test, with all that its frames hold
        vars(sys).pop(name, None)
    if mx.get_active_memory() > settled + 4096:
        gc.collect()
    settled = mx.get_active_memory()


@pytest.fixture(scope="module")
def quick_garbage() -> Iterator[None]:
    """Let collections look only at what the tests of a module made.

    A search begins with one of everything that was ever imported, which takes longer than the whole of a small search.
    """
    with quick_collections():
        yield


@pytest.fixture(autouse=True)
def _own_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> None:
    """Pages and docstrings write files as a reader would: into a folder of their own."""
    if type(request.node).__name__ == "SybilItem":
        page = os.path.basename(str(request.node.path)).replace(".", "-")
        folder = tmp_path_factory.getbasetemp() / page
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)


def _begin(_: dict[str, Any]) -> None:
    """Examples begin as a reader's script does: with nothing in memory, which their budgets count on."""
    if mx.get_active_memory() > 100_000:
        gc.collect()
    mx.clear_cache()
    mx.random.seed(0)


def _end(namespace: dict[str, Any]) -> None:
    """What a page made ends with it: models in a page's namespace would count against the next page's budgets."""
    namespace.clear()


def _python(document: Document) -> Iterator[Region]:
    """The Python blocks of a page; what each prints is kept for the block below it."""
    for region in PythonCodeBlockParser()(document):
        evaluate = region.evaluator

        def evaluate_and_keep(example: Example, evaluate: Any = evaluate) -> Any:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                result = evaluate(example)
            example.namespace["__printed__"] = printed.getvalue()
            return result

        region.evaluator = evaluate_and_keep
        yield region


def _output(document: Document) -> Iterator[Region]:
    """The output under `<!-- prints -->`: what the Python block above it has printed."""
    for block in re.finditer(r"^<!-- prints -->\n```text\n(.*?)^```$", document.text, re.MULTILINE | re.DOTALL):
        yield Region(block.start(), block.end(), block[1], _compare)


def _compare(example: Example) -> str | None:
    printed = example.namespace.get("__printed__", "")
    return None if matches(example.parsed, printed) else f"The page says\n{example.parsed}\nbut it prints\n{printed}"


docstrings = Sybil(
    name="docstrings",
    path="mlx_tune",
    parsers=[DocTestParser()],
    patterns=["*.py"],
    document_types={".py": PythonDocStringDocument},
    fixtures=["_own_folder"],
    setup=_begin,
    teardown=_end,
)
# No parser for skipping: a Python block that cannot run has no place on a page.
page_parsers = [_python, _output]
page_options: dict[str, Any] = {"fixtures": ["_own_folder"], "setup": _begin, "teardown": _end}
pages = Sybil(name="pages", path="docs", parsers=page_parsers, patterns=["*.md"], **page_options)
readme = Sybil(name="readme", parsers=page_parsers, filenames=["README.md"], **page_options)
pytest_collect_file = SybilCollection([docstrings, pages, readme]).pytest()
