"""Eighty columns: help, usage, and the lines that commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command_help import help_of

from mlx_tune.cli import SUBCOMMANDS, main
from mlx_tune.cli.output import command_lines


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", ["", *SUBCOMMANDS])
def test_help_fits(command: str, capsys) -> None:
    text = help_of(command, capsys)
    assert [line for line in text.splitlines() if len(line) > 80] == []


SMALL = ["--max-seq-length", "33", "--memory-budget", "1GB"]

COMMANDS = {
    "estimate": ["--batch-size", "2", *SMALL],
    "autobatch": ["--max-batch", "2", *SMALL],
    "checkpoint": ["--batch-size", "2", *SMALL],
    "fit": ["--max-batch", "2", *SMALL],
    "verify": ["--batch-size", "1", *SMALL],
    "plan": ["--plan", "--skip", "*.layers.0.*"],
    "quantize": ["--verbose"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_commands_print_fits(name: str, model_folder, data_folder, tmp_path: Path, capsys) -> None:
    command = {"verify": "checkpoint", "plan": "quantize"}.get(name, name)
    words = [command, "--model", str(model_folder("tied")), *COMMANDS[name]]
    if command == "quantize":
        words += [] if name == "plan" else ["--mlx-path", str(tmp_path / "out")]
    else:
        words += ["--data", str(data_folder)]
    if name == "verify":
        words += ["--verify"]
    assert main(words) == 0
    out = capsys.readouterr().out
    # The paths of this test are longer than a line.
    lines = [line for line in out.splitlines() if "/" not in line]
    assert [line for line in lines if len(line) > 80] == []
    assert len(lines) > 3


@pytest.mark.parametrize("command", ["autobatch", "fit", "checkpoint"])
def test_the_command_that_trains_so_is_named_and_can_be_read(
    command: str, model_folder, data_folder, capsys, monkeypatch
) -> None:
    words = ["--model", str(model_folder("tied")), "--data", str(data_folder), "--num-layers", "2", *COMMANDS[command]]
    assert main([command, *words]) == 0
    text = capsys.readouterr().out.partition("To train so on the command line")[2]
    next_words = shlex.split(text.partition("\n  ")[2].replace("\\\n", " "))
    seen = []
    monkeypatch.setattr("mlx_tune.cli.lora.run", lambda arguments: seen.append(arguments) or 0)
    assert main(next_words[1:]) == 0
    assert seen[0].model == str(model_folder("tied"))
    assert seen[0].num_layers == 2
    assert seen[0].memory_budget == "1GB"
    assert {"autobatch": "largest", "fit": "auto", "checkpoint": 2}[command] == seen[0].batch_size


def test_the_example_in_the_help_works_on_a_tied_model(model_folder, capsys) -> None:
    text = help_of("quantize", capsys).partition("examples:")[2].replace("\\\n", " ")
    plan = next(line for line in text.splitlines() if "--plan" in line)
    words = [str(model_folder("tied")) if word == "models/mine" else word for word in shlex.split(plan)]
    assert main(words[1:]) == 0
    assert "8 bits" in capsys.readouterr().out


def test_an_error_that_is_not_known_ends_with_1_and_the_way_to_report_it(capsys) -> None:
    assert main(["doctor", "--explain", "an error that nobody has seen"]) == 1
    out = capsys.readouterr().out
    assert "not in the table" in out
    assert "Report it with what `mlx-tune doctor --issue` prints" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_long_commands_are_continued_with_backslashes() -> None:
    words = ["mlx-tune", "lora", "--model", "my models/mine", *[w for i in range(9) for w in (f"--option-{i}", str(i))]]
    text = command_lines(words)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert not any(re.search(r"--\S+ \\$", line) for line in text.splitlines())
    assert shlex.split(text.replace("\\\n", " ")) == words
