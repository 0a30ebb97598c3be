from __future__ import annotations

import re

import pytest
from command_help import help_of

from mlx_tune.cli import SUBCOMMANDS, main


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_lists_no_option_twice(command: str, capsys) -> None:
    options = re.findall(r"^  (-\S+(?:,? [^ -]\S*)?(?:, --\S+)*)", help_of(command, capsys), flags=re.MULTILINE)
    names = [name for line in options for name in re.findall(r"--[\w-]+", line)]
    assert len(names) == len(set(names)) > 3
    if command == "lora":
        assert {"--batch-size", "--grad-checkpoint", "--iters", "--learning-rate"} <= set(names)


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_an_unknown_flag_shows_the_usage_of_the_subcommand(command: str, capsys) -> None:
    needed = {"demo": [], "doctor": [], "bench": [], "fits": ["x"]}.get(command, ["--model", "x"])
    with pytest.raises(SystemExit) as caught:
        main([command, *needed, "--no-such-flag"])
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert err.startswith(f"usage: mlx-tune {command} [-h] ")
    assert f"mlx-tune {command}: error: unrecognized arguments: --no-such-flag" in err
    assert all(len(line) <= 80 for line in err.splitlines())
