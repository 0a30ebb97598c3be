from __future__ import annotations

import pytest
from quantization_toys import few_runs
from toy_models import data_folder, model_folder, tokenizer_folder

from mlx_tune.cli import main

__all__ = ["data_folder", "few_runs", "model_folder", "tokenizer_folder"]


@pytest.fixture(scope="module", autouse=True)
def quick(quick_garbage: None) -> None:
    """Every command that searches collects garbage."""


@pytest.fixture
def tool(model_folder, data_folder, capsys):
    """Run a subcommand on a toy model; returns its exit code, standard output and standard error."""

    def call(command: str, *options: str, model: str = "tied", data: bool = True) -> tuple[int, str, str]:
        words = [
            command,
            "--model",
            str(model_folder(model)),
            *(["--data", str(data_folder)] if data else []),
            *options,
        ]
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
