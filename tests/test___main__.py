import runpy

import pytest

from mlx_tune.cli import main


def test_the_package_is_the_command(monkeypatch, capsys):
    with pytest.raises(SystemExit) as asked:
        main(["--help"])
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["mlx_tune", "--help"])
    with pytest.raises(SystemExit) as ran:
        runpy.run_module("mlx_tune", run_name="__main__")
    assert (ran.value.code, capsys.readouterr().out) == (asked.value.code, expected)


def test_its_exit_code_is_that_of_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mlx_tune", "no-such-subcommand"])
    with pytest.raises(SystemExit) as ran:
        runpy.run_module("mlx_tune", run_name="__main__")
    assert ran.value.code == 2
    assert "no-such-subcommand" in capsys.readouterr().err
