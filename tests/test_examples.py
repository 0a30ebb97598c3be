"""The examples run, with small settings, and stay small enough to read in one go."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toy_models import model_folder, tokenizer_folder

__all__ = ["model_folder", "tokenizer_folder"]

FOLDER = Path(__file__).parents[1] / "examples"
MOST_LINES = 80

#: How each example is run, and what it prints near the end of a run that went well.
RUNS: dict[str, tuple[str, str]] = {
    "finetune.py": ("--model MODEL --text TEXT --out out --steps 2 --length 32 --budget 200MB", "saved"),
    "quantize_report.py": (
        "--model MODEL --held-out TEXT/0.txt --calibration TEXT/1.txt --length 32 --batches 1 --plot report.svg",
        "same top",
    ),
    "checkpoint_custom_block.py": ("", "keeping the product"),
    "batch_finder.py": ("20MB", "step 4: loss"),
    "two_machines.py": ("", "rank 0: loss"),
    "wired_generate.py": ("--model MODEL --max-tokens 4", "tokens/s without"),
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Four files of text that differ."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(4):
        words = " ".join(f"memory {i * k % 13} in a lazy graph can be planned {k} times" for k in range(24))
        (folder / f"{i}.txt").write_text(words)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_example_runs(name, model_folder, text_folder, tmp_path):
    words, said = RUNS[name]
    places = {"MODEL": str(model_folder("tied")), "TEXT": str(text_folder)}
    arguments = [re.sub("MODEL|TEXT", lambda word: places[word[0]], argument) for argument in words.split()]
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        cwd=tmp_path,
        env=dict(os.environ, HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_every_example_is_run_listed_and_short():
    lines = {path.name: len(path.read_text().splitlines()) for path in FOLDER.glob("*.py")}
    assert set(lines) == set(RUNS)
    listed = re.findall(r"^\| `(\w+\.py)` \|", (FOLDER.parent / "docs" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(lines)
    assert {name: count for name, count in lines.items() if count >= MOST_LINES} == {}
