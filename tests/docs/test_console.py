"""Every command in a console block of the documentation is run, and what the page says it prints is compared.

A block that is not run says why in a comment on the line before it: `<!-- not run: it installs packages -->`. Output
that differs from machine to machine is left out of the page, or stands there as `...`, as in a doctest. A model or
data folder that a page names is replaced by a toy one, and files under `examples/` and `tests/` are this checkout's.
Of models on the hub only `config.json` is there, for those of `tests/models/`, as if it had been fetched before.
Benchmarks take minutes: of them it is only held that the script is there and takes every flag that the page gives it.
Two ranks of `mlx.launch` are two processes of this machine.
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
from launching import LAUNCHER, free_port
from page_output import matches

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^[ ]*<!--\s*not run:(?P<reason>[^\n]*?)-->\s*?\n\s*?)?"
    r"^(?P<indent>[ ]*)```console\n(?P<body>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
#: What a command of a page may begin with.
_PROGRAM = re.compile(r"\s*(\$|mlx-tune|mlx\.launch|mlx_lm\.\w+|python3?|pip|uv|export|sudo|git|brew) ")

#: Stands in a command for a port that is free when it is run.
_FREE_PORT = "FREE PORT"
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
    for file in (ROOT / "tests" / "models").glob("*/*.json"):
        _keep_fetched(folder / "hub", f"{file.parent.name}/{file.stem}", file)
    return folder


def _keep_fetched(cache: Path, name: str, file: Path) -> None:
    """Put a model's configuration where huggingface_hub keeps what it has fetched."""
    place, revision = cache / f"models--{name.replace('/', '--')}", "0" * 40
    for part in (place / "refs", place / "snapshots" / revision):
        part.mkdir(parents=True)
    (place / "refs" / "main").write_text(revision)
    (place / "snapshots" / revision / "config.json").symlink_to(file)


@functools.cache  # pages repeat each other's commands
def run(words: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(folder / "hub"), COLUMNS="120", NO_COLOR="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/benchmarks")])
    port = free_port()
    words = tuple(port if word == _FREE_PORT else word for word in words)
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def here(words: list[str]) -> list[str]:
    """A command of a page, as this checkout runs it on toys."""
    program, *rest = words
    if program == "mlx.launch":
        dashes = rest.index("--") if "--" in rest else len(rest)
        return [LAUNCHER, *rest[:dashes], "--starting-port", _FREE_PORT, "--", *here(rest[dashes + 1 :])]
    if [program, *rest[:2]] == ["uv", "run", "python"]:
        program, rest = "python", rest[2:]
    assert program in ("mlx-tune", "python"), f"run it here, or say why not: <!-- not run: ... -->: {shlex.join(words)}"
    for option, place in _STAND_INS.items():
        if option in rest:
            rest[rest.index(option) + 1] = place
    return [sys.executable, *(("-m", "mlx_tune") if program == "mlx-tune" else ()), *rest]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.line}")
def test_the_command_does_what_the_page_says(command, folder):
    if command.reason:
        pytest.skip(command.reason)
    words = shlex.split(command.line, comments=True)
    benchmark = next((word for word in words if word.startswith("tests/benchmarks/")), None)
    if benchmark:
        script = (ROOT / benchmark).read_text()
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in script] == []
        return
    done = run(tuple(here(words)), folder)
    # 1 is bad news from the doctor, and depends on the machine.
    assert done.returncode in ((0, 1) if words[:2] == ["mlx-tune", "doctor"] else (0,)), done.stderr
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_hides_where_it_is_not_run(page):
    """Commands stand in console blocks, behind a `$` or under the reason why they are not run."""
    text = page.read_text()
    for block in _BLOCK.finditer(text):
        assert block["reason"] or re.search(r"^ *\$ ", block["body"], re.MULTILINE), block[0]
    for _, language, body in re.findall(r"^( *)```([^\n]*)\n(.*?)^\1``` *$", text, re.MULTILINE | re.DOTALL):
        assert language in ("python", "console", "text"), f"nothing runs a block of {language or 'no language'}"
        if language == "text" and page.name != "cli.md":  # its examples are parsed in tests/docs/test_cli_page.py
            assert not [line for line in body.splitlines() if _PROGRAM.match(line)], "use ```console"
