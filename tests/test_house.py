"""The house stays one that can be walked: no circles, short chains, folders and files that one can take in."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import House

#: What has been reached. Lower them when it gets better.
LONGEST_CHAIN, CIRCLES, MOST_FILES, MOST_LINES, ANYS = 16, 0, 15, 402, 13


@pytest.fixture(scope="module")
def house() -> House:
    return House()


def test_no_files_import_one_another(house: House) -> None:
    assert len(house.circles()) <= CIRCLES, house.circles()


def test_chains_of_imports_are_short(house: House) -> None:
    chain = house.longest_chain()
    assert len(chain) <= LONGEST_CHAIN, " > ".join(chain)


def test_folders_and_files_can_be_taken_in(house: House) -> None:
    assert max(house.files_by_folder().values()) <= MOST_FILES
    assert max(house.lines().values()) <= MOST_LINES


def test_types_are_named(house: House) -> None:
    assert house.anys() <= ANYS


def test_docstrings_say_what_a_thing_is(house: House) -> None:
    asked, every = house.questions()
    assert asked < 0.02 * every


def test_what_is_counted(tmp_path: Path) -> None:
    """A package of known chains and circles."""
    texts = {
        "__init__": "",
        "top": "from p import middle\nfrom p.side import x",
        "middle": "def f():\n    import p.bottom",
        "bottom": "import os, p.room",
        "side": "if TYPE_CHECKING:\n    from p.other import y",
        "other": "from p.side import x",
        "room.__init__": "",
        "room.inner": '"""What it is."""\nfrom p import bottom, side',
    }
    for name, text in texts.items():
        path = tmp_path / "p" / f"{name.replace('.', '/', name.count('.') - name.count('.__'))}.py"
        if name == "room.__init__":
            path = tmp_path / "p" / "room" / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    house = House(tmp_path, "p")
    assert house.circles() == [["p.other", "p.side"]]
    assert house.longest_chain() == ["p.top", "p.middle", "p.bottom", "p.room"]
    assert house.files_by_folder() == {"p": 6, "p/room": 2}
    assert house.questions() == (1, 1)
