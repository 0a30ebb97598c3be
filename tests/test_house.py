"""The house stays one that can be walked: no circles, short chains, folders and files that one can take in."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from house import House

#: What has been reached. Lower them when it gets better.
LONGEST_CHAIN, CIRCLES, MOST_FILES, MOST_LINES, ANYS = 14, 0, 15, 402, 9

#: Source files without a test file of their own name.
UNTESTED = 2

#: Files on the way of a model through quantize_model, and returns to one left before.
WAY_FILES, WAY_RETURNS = 21, 50


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


def test_source_files_have_a_test_file_of_their_own(house: House) -> None:
    """At the place in `tests/` that mirrors theirs."""
    assert len(house.untested()) <= UNTESTED, house.untested()


def test_types_are_named(house: House) -> None:
    assert house.anys() <= ANYS


def test_docstrings_say_what_a_thing_is(house: House) -> None:
    asked, every = house.questions()
    assert asked < 0.02 * every


def test_a_model_is_easy_to_follow(house: House) -> None:
    way = house.way_of_model()
    assert len(way.files) <= WAY_FILES, sorted(way.files)
    assert way.returns <= WAY_RETURNS, way.steps


def test_the_way_of_a_model(tmp_path: Path) -> None:
    """A package in which each rule of the count is met once."""
    house = _package(
        tmp_path,
        {
            "__init__": "",
            "start": """
                from p.below import below, unseen
                from p.held import Held, Plain, held_by
                from p.other import other
                def quantize_model(model, size: int):
                    unseen(size, lambda: below(model))      # below, though inside another call's argument
                    held = Held(model)                      # held
                    found = other(held, below)              # other, from there below, which is read already
                    unseen(len([held]), f"{held}", held == 1)  # none: numbers, texts and truth values
                    unseen(held.size, Plain(size).size)     # none: fields that hold no model
                    for thing, number in zip(found.parts, [1]):
                        unseen(number)                      # none
                        thing.run()                         # held: the method is given its object
                    partial(below, model)                   # below
                    mine(sorted([held])[0])                 # start
                    held_by(number)                         # none
                    theirs(held.run)                        # start, where the method is called: held
                def mine(x):
                    unseen(2)
                def theirs(x):
                    x()
            """,
            "below": "def below(given):\n    unseen(given)\ndef unseen(*x): ...",
            "held": """
                class Held:
                    def __init__(self, model):
                        self.model, self.size = model, 1
                    def run(self): ...
                class Plain:
                    size: int
                class Parts:
                    parts: list[Held]
                def held_by(x) -> Held: ...
            """,
            "other": "from p.held import Parts\ndef other(held, call) -> Parts:\n    call(held.model)",
        },
    )
    way = house.way_of_model("start")
    names = ("start", "below", "held", "other", "below", "held", "below", "start", "held")
    assert way.steps == [f"p.{name}" for name in names]
    assert (len(way.files), way.returns) == (4, 5)


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
    house = _package(tmp_path, texts)
    assert house.circles() == [["p.other", "p.side"]]
    assert house.longest_chain() == ["p.top", "p.middle", "p.bottom", "p.room"]
    assert house.files_by_folder() == {"p": 6, "p/room": 2}
    assert house.questions() == (1, 1)
    for name in ("test_top", "room/test_inner", "test_inner"):
        (tmp_path / "tests" / name).with_suffix(".py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).with_suffix(".py").touch()
    assert house.untested() == ["p.bottom", "p.middle", "p.other", "p.side"]


def _package(root: Path, texts: dict[str, str]) -> House:
    """A package `p` of these files."""
    for name, text in texts.items():
        path = root / "p" / f"{name.replace('.', '/', name.count('.') - name.count('.__'))}.py"
        if name == "room.__init__":
            path = root / "p" / "room" / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return House(root, "p")
