"""A broken link, anchor or reference fails the build of the documentation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WHOLE = """
# A page

## A heading

[this page](index.md), [the heading](#a-heading), [a function][mlx_tune.parse_bytes]

::: mlx_tune.parse_bytes
"""
FAULTS = {
    "[away](missing.md)": "link 'missing.md', but the target is not found",
    "[no such heading](#nothing)": "link '#nothing', but there is no such anchor",
    "[no such function][mlx_tune.nothing]": "Could not find cross-reference target 'mlx_tune.nothing'",
}


def build(folder: Path, page: str) -> subprocess.CompletedProcess[str]:
    """Build one page with the project's own settings."""
    settings, _, _ = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(page)
    (folder / "mkdocs.yml").write_text(settings)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_whole_page_builds_and_one_with_faults_says_all_of_them(tmp_path):
    for name in ("whole", "faulty"):
        (tmp_path / name).mkdir()
    whole = build(tmp_path / "whole", WHOLE)
    assert whole.returncode == 0, whole.stderr
    faulty = build(tmp_path / "faulty", "\n\n".join([WHOLE, *FAULTS]))
    assert faulty.returncode != 0
    for fault, said in FAULTS.items():
        assert said in faulty.stderr, f"{fault}: {faulty.stderr}"
