"""Workflows name what is there: commands, markers, files; and the one for Macs keeps what it measured."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from mlx_tune.cli import build_parser

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MARKERS = {
    marker.partition(":")[0]
    for marker in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
}


def steps(file: Path) -> list[dict]:
    return [step for job in yaml.safe_load(file.read_text())["jobs"].values() for step in job["steps"]]


def commands(file: Path) -> list[str]:
    return [line for step in steps(file) for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_of_the_library_are_ones_that_its_parser_takes(file):
    for command in commands(file):
        words = shlex.split(command.replace("|| true", ""), comments=True)
        if "mlx-tune" in words:
            parsed, unknown = build_parser().parse_known_args(words[words.index("mlx-tune") + 1 :])
            assert unknown == [], command
            assert parsed.command


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_tests_are_chosen_by_markers_and_files_that_there_are(file):
    for command in commands(file):
        words = shlex.split(command, comments=True)
        if "pytest" not in words:
            continue
        for word in words:
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), command
        if "-m" in words:
            assert set(re.findall(r"\w+", words[words.index("-m") + 1])) <= MARKERS | {"not", "and", "or"}, command


def test_the_one_for_macs_runs_what_needs_metal_and_keeps_what_was_measured():
    file = ROOT / ".github" / "workflows" / "macos.yml"
    assert yaml.safe_load(file.read_text())["jobs"]["apple-silicon"]["runs-on"].startswith("macos-")
    run = "\n".join(commands(file))
    assert "pytest -n 0 -m metal" in run
    measured = re.search(r"mlx-tune bench --quick --out (\S+)", run)
    assert measured
    (kept,) = [step for step in steps(file) if step.get("uses", "").startswith("actions/upload-artifact")]
    assert kept["with"]["path"] == measured[1]
    assert kept["if"] == "always()", "a bench that broke off has written what it has"
