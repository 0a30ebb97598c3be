"""The Python blocks of the documentation really are run: all of them, each page on its own, and a wrong one fails."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FIRST = """
```python
import mlx.core as mx

x = mx.ones((1000,))
mx.eval(x)
assert mx.get_active_memory() >= x.nbytes
```

```python
assert x.sum().item() == 1001
```

- A list with a block.

    ```python
    assert x.sum().item() == 1000
    print("first\\nin 12 ms\\nlast")
    ```

<!-- prints -->
```text
first
in ... ms
last
```

<!-- prints -->
```text
first
last
```
"""
SECOND = """
```python
import mlx.core as mx

assert "x" not in globals()
assert mx.get_active_memory() < 1000  # the random state
```
"""


def test_a_wrong_block_fails_and_pages_leave_nothing_to_each_other(tmp_path):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    shutil.copy(ROOT / "tests" / "page_output.py", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "first.md").write_text(FIRST)
    (tmp_path / "docs" / "second.md").write_text(SECOND)
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfE", "--rootdir", str(tmp_path), "docs"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 4 passed" in done.stdout, done.stdout
    assert re.search(r"FAILED docs/first.md::.*line:10", done.stdout), done.stdout
    assert re.search(r"The page says\s+first\s+last\s+but it prints\s+first\s+in 12 ms\s+last", done.stdout), (
        done.stdout
    )


def indirect(page):
    """Sentences of a page's prose, code, tables and headings left out, that begin with What, Whether or Nothing."""
    page = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^\s*(#|\||!\[|<).*$", "", page, flags=re.MULTILINE)
    begins = r"(?:\A|\n\n|[.!?:)]\s+|\n- |\n\d+\. |\*\*)"
    sentences = re.findall(rf"{begins}\s*((?:What|Whether|Nothing)\b[^.?]*[.?]?)", prose)
    return [sentence for sentence in sentences if not sentence.endswith("?")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_begin_with_a_noun_or_a_verb(page):
    assert indirect(page.read_text()) == []


def test_a_sentence_that_begins_otherwise_is_found():
    page = (
        "# What a heading says\n\nIt works. What it does\nis this. What is left?\n\n- Nothing of it.\n\n| Whether |\n"
    )
    assert indirect(page) == ["What it does\nis this.", "Nothing of it."]


@pytest.fixture(scope="module")
def parse():
    return runpy.run_path(str(ROOT / "conftest.py"))["pages"].parse


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_is_collected(page, parse):
    written = re.findall(r"^ *(?:> *)*(?:```+|~~~+) *\{?\.?py.*$", page.read_text(), re.MULTILINE | re.IGNORECASE)
    outputs = page.read_text().count("<!-- prints -->\n```text\n")
    assert len(list(parse(page).examples())) == len(written) + outputs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_row_of_a_table_is_whole(page):
    """A line break or a missing bar would end the table there."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^ *\|[^\n]*\n)+", text, re.MULTILINE):
        rows = [re.sub(r"\\\||`[^`]*`", "", row).strip() for row in table.splitlines()]
        assert all(row.endswith("|") for row in rows), table
        assert len({row.count("|") for row in rows}) == 1, table
