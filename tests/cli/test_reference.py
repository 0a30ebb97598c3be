"""The page about the command line is what the parsers say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mlx_tune.cli import SUBCOMMANDS, main

SCRIPT = Path(__file__).parents[2] / "docs" / "make_cli_reference.py"


def test_the_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_cli_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run: python docs/make_cli_reference.py"


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_has_examples(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"  mlx-tune {command}" in out


@pytest.mark.parametrize("words", [[], ["nothing"], ["estimate"], ["quantize", "--bits"]])
def test_a_command_line_that_is_none_ends_with_code_2(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: mlx-tune" in capsys.readouterr().err
