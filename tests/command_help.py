"""Help as a command prints it."""

from __future__ import annotations

import pytest

from mlx_tune.cli import main


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit):
        main([*([command] if command else []), "--help"])
    return capsys.readouterr().out
