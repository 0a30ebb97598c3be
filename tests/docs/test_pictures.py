"""The pictures of the pages: each in a light and a dark dress with the same words for it, all made by one script."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)#]*assets/([\w-]+?)-(light|dark)\.svg)#only-(light|dark)\)")


def shown() -> dict[str, dict[str, str]]:
    """The words for each picture by its dress."""
    found: dict[str, dict[str, str]] = {}
    for page in DOCS.rglob("*.md"):
        for words, file, name, dress, only in PICTURE.findall(page.read_text()):
            assert dress == only, f"{page}: {file} for {only} pages"
            assert (page.parent / file).exists(), f"{page}: {file}"
            found.setdefault(name, {})[dress] = words
    return found


def test_every_picture_is_shown_for_light_and_dark_pages_with_the_same_words():
    pictures = shown()
    assert set(pictures) == {file.stem.rpartition("-")[0] for file in (DOCS / "assets").glob("*.svg")}
    for name, words in pictures.items():
        assert words.keys() == {"light", "dark"}, name
        assert words["light"] == words["dark"], name
        assert len(words["light"]) > 60, f"{name}: say what there is to see"


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["step-memory", "quantization", "wiring"])  # the fourth is a search of real steps
def test_the_script_makes_the_picture_again(picture, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_pictures.py", picture, "--to", str(tmp_path)])
    runpy.run_path(str(DOCS / "make_pictures.py"), run_name="__main__")
    made = {file.name: file.read_text() for file in tmp_path.glob("*.svg")}
    assert set(made) == {file.name for file in (DOCS / "assets").glob(f"{picture}*.svg")}
    for name, text in made.items():
        assert text.startswith("<?xml")
        assert len(text) < 100_000, "too large for a page"
        if "-light" in name:
            assert text != made[name.replace("-light", "-dark")], "one dress for both"
