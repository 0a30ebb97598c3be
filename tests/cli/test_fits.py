from __future__ import annotations

import json

import pytest

from mlx_tune.cli import main


def test_fits_answers_in_text_and_json(model_folder, capsys):
    folder = str(model_folder("untied"))
    assert main(["fits", folder, "--machine", "M1 8GB", "--max-seq-length", "64", "--batch-size", "2"]) == 0
    assert capsys.readouterr().out.startswith("LoRA of ")
    assert main(["fits", f"{folder}/config.json", "--memory", "16GB", "--max-seq-length", "64", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["machine"]["name"] == "Mac 16 GB"
    for name in ("fits", "floor_bytes", "peak_bytes", "budget_bytes", "largest_batch", "longest_row", "rows"):
        assert answer[name]


def test_fits_ends_with_1_where_it_does_not(model_folder, capsys):
    options = ["--memory-budget", "3MB", "--max-seq-length", "512", "--batch-size", "8", "--fine-tune", "full"]
    assert main(["fits", str(model_folder("tied")), *options]) == 1
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["no/folder/here"], "no file or folder here"),
        (["MODEL", "--machine", "M3 Mux 64GB"], "The nearest are M3 Max 64 GB"),
        (["MODEL", "--memory-budget", "1kB"], "The weights of"),
    ],
)
def test_fits_refuses_in_one_line(model_folder, capsys, options, text):
    words = [str(model_folder("tied")) if word == "MODEL" else word for word in options]
    assert main(["fits", *words]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
