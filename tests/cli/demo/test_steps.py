"""The demonstration, on little text and with few steps."""

from __future__ import annotations

import json

import pytest

from mlx_tune.cli import main


@pytest.mark.slow
def test_the_whole_path(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    code = main(["demo", "--text", str(text), "--steps", "4", "--budget", "40MB", "--out", str(out), "--json"])
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert code == 0
    training = figures["training"]
    assert training["perplexity_after"] < training["perplexity_before"], "it learned"
    assert figures["batch"]["checkpointed"]["batch_size"] >= figures["batch"]["plain"]["batch_size"]
    reports = figures["quantization"]
    kl = [reports[f"{bits}-bit"]["accuracy"]["mean_kl"] for bits in (8, 4, 3)]
    assert 0 < kl[0] < kl[1] < kl[2], "fewer bits cost more"
    sizes = [reports[f"{bits}-bit"]["size_after_bytes"] for bits in (8, 4, 3)]
    assert sizes[0] > sizes[1] > sizes[2]
    saved = figures["saved"]["perplexity_after_loading"]
    assert saved == pytest.approx(reports["4-bit"]["accuracy"]["perplexity_after"], rel=1e-4)
    assert figures["saved"]["text"]
    told = printed.err[printed.err.index("Machine") :].partition("It writes:")[0]
    assert [line for line in told.splitlines() if len(line) > 80 and "/" not in line] == []
    assert {p.name for p in (out / "model-4bit").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "at least one step"),
        (["--budget", "much"], "'much' is not a number of bytes"),
        (["--text", "no/such/place"], "no file or folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(options, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists(), "nothing is half written"


def test_a_folder_that_is_in_use_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
