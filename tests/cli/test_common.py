"""What every subcommand has in common: help with examples, and usage errors."""

from __future__ import annotations

import pytest

from mlx_tune.cli import SUBCOMMANDS, main


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
