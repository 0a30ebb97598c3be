"""Every command in a console block of the documentation is run, and what the page says it prints is compared.

A block that is not run says why in a comment on the line before it: `<!-- not run: it installs packages -->`. Output
that differs from machine to machine is left out of the page, or stands there as `...`, as in a doctest. A model or
data folder that a page names is replaced by a toy one, and files under `examples/` and `tests/` are this checkout's.
Benchmarks take minutes: of them it is only held that the script is there and takes every flag that the page gives it.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^[ ]*<!--\s*not run:(?P<reason>[^\n]*?)-->\s*?\n\s*?)?"
    r"^(?P<indent>[ ]*)```console\n(?P<body>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
#: An option whose value is a place on the reader's machine, and the toy that stands in for it.
_STAND_INS = {"--model": "model", "--data": "data", "--text": "text", "--adapter-path": "adapters"}


@dataclass(frozen=True)
class Command:
    """One `$` line of a page, and what the page says it prints."""

    page: str
    line: str
    output: str
    reason: str = ""


def commands_of(text: str, page: str) -> list[Command]:
    """The commands in a page's console blocks, in order."""
    found = []
    for block in _BLOCK.finditer(text):
        body = textwrap.dedent(block["body"]).replace("\\\n", " ")
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            found.append(Command(page, " ".join(line.split()), output.strip(), (block["reason"] or "").strip()))
    return found


def matches(expected: str, printed: str) -> bool:
    """Whether the output is what the page says, where `...` stands for anything and runs of blanks are one."""
    pieces = [re.escape(" ".join(piece.split())) for piece in expected.split("...")]
    return re.fullmatch(r"\s*.*?\s*".join(pieces), " ".join(printed.split()), re.DOTALL) is not None


COMMANDS = [command for page in PAGES for command in commands_of(page.read_text(), str(page.relative_to(ROOT)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder, data_folder):
    """Where a reader would be: a checkout's scripts, a model, a data set and some text."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("examples", "tests", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "model").symlink_to(model_folder("tied"))
    (folder / "data").symlink_to(data_folder)
    (folder / "text").mkdir()
    for i in range(4):
        (folder / "text" / f"{i}.txt").write_text("Memory in a lazy graph can be planned before. " * 80)
    return folder


@functools.cache  # pages repeat each other's commands
def run(words: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, HF_HUB_OFFLINE="1", COLUMNS="120", NO_COLOR="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/benchmarks")])
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.line}")
def test_the_command_does_what_the_page_says(command, folder):
    if command.reason:
        pytest.skip(command.reason)
    program, *words = shlex.split(command.line, comments=True)
    if (program, words[:2]) == ("uv", ["run", "python"]):
        program, words = "python", words[2:]
    assert program in ("mlx-tune", "python"), f"run it here, or say why not: <!-- not run: ... -->: {command.line}"
    if program == "python" and words[0].startswith("tests/benchmarks/"):
        script = (ROOT / words[0]).read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in script] == []
        return
    for option, place in _STAND_INS.items():
        if option in words:
            words[words.index(option) + 1] = place
    done = run((sys.executable, *(("-m", "mlx_tune") if program == "mlx-tune" else ()), *words), folder)
    # 1 is bad news from the command line, a check of the doctor for one, and depends on the machine.
    assert done.returncode in ((0, 1) if program == "mlx-tune" else (0,)), done.stderr
    assert "Traceback" not in done.stderr
    if command.output:
        assert matches(command.output, done.stdout), done.stdout


def test_blocks_are_found_with_their_output_and_their_reason():
    page = """
    text
    ```console
    $ mlx-tune doctor \\
        --json
    one ... three
    $ python a.py
    ```

    <!-- not run: it installs -->
    ```console
    $ pip install it
    ```
    """
    first, second, third = commands_of(page, "page.md")
    assert (first.line, first.output, first.reason) == ("mlx-tune doctor --json", "one ... three", "")
    assert (second.line, second.output, second.reason) == ("python a.py", "", "")
    assert (third.line, third.reason) == ("pip install it", "it installs")


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a b", "a  b\n", True),
        ("a ... d", "a b\nc d", True),
        ("a ...", "b", False),
        ("12 MB", "13 MB", False),
        ("(x)", "(x)", True),
    ],
)
def test_output_is_compared_up_to_dots_and_blanks(expected, printed, same):
    assert matches(expected, printed) is same


def test_no_command_hides_in_a_block_of_another_language():
    """Shell commands stand in console blocks, where they are run."""
    for page in PAGES:
        assert not re.search(r"^\s*```(sh|bash|shell)$", page.read_text(), re.MULTILINE), f"{page}: use ```console"
