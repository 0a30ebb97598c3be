"""What every subcommand has in common: help with examples, and usage errors."""

from __future__ import annotations

import os
import subprocess
import sys

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


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "out/model.safetensors"), "No space left on device: 'out/model.saf"),
        (OSError("something"), "something"),
        (MemoryError(), "out of memory (MemoryError). Take a smaller batch"),
        (
            RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory\nmore"),
            "out of memory (cudaMallocAsync(&data, size, stream) failed: out of memory). Take",
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, error: Exception, line: str) -> None:
    def refused(arguments: object) -> int:
        raise error

    monkeypatch.setattr("mlx_tune.cli.fit.run", refused)
    assert main(["fit", "--model", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mlx-tune fit: {line}")
    assert err.count("\n") == 1


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch) -> None:
    def broken(arguments: object) -> int:
        raise RuntimeError("[matmul] shapes")

    monkeypatch.setattr("mlx_tune.cli.fit.run", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["fit", "--model", "x"])


def test_a_reader_that_has_gone_is_no_error() -> None:
    words = [sys.executable, "-m", "mlx_tune", "doctor", "--list", "--json"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize("path", ["memory.gif", "/dev/null/memory.svg"])
@pytest.mark.parametrize("command", ["estimate", "autobatch", "fit"])
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(command: str, path: str, capsys) -> None:
    assert main([command, "--model", "nobody/nothing-of-this-name", "--plot", path]) == 2
    assert capsys.readouterr().err.startswith(f"mlx-tune {command}: --plot {path!r}: ")
