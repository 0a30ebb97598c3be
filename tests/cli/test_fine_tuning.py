from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_tune.cli import main


@pytest.mark.parametrize("command", ["estimate", "autobatch", "checkpoint", "fit", "lora"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--config", "nowhere.yaml"], "The configuration file 'nowhere.yaml' cannot be read: No such file"),
        (["--num-layers", "99"], "num_layers=99: the model has 3 blocks"),
        (["--max-seq-length", "0"], "max_seq_length=0: give a whole number of at least 1"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tool, command: str, options: list[str], text: str) -> None:
    code, out, err = tool(command, *options, *(["--train"] if command == "lora" else []))
    assert code == 2
    assert out.replace("\n", "") in ("", "Loading pretrained model")
    lines = [line for line in err.splitlines() if line.startswith(f"mlx-tune {command}: ")]
    assert len(lines) == 1
    assert text in lines[0]


def test_bad_data_is_named(tool, tmp_path: Path) -> None:
    code, _, err = tool("estimate", "--data", str(tmp_path), data=False)
    assert code == 2
    assert "Training set not found or empty" in err
    (tmp_path / "train.jsonl").write_text('{"text": "a"\n')
    code, _, err = tool("estimate", "--data", str(tmp_path), data=False)
    assert code == 2
    assert "is not JSON lines" in err
    (tmp_path / "train.jsonl").write_text('{"words": "a"}\n')
    code, _, err = tool("estimate", "--data", str(tmp_path), data=False)
    assert code == 2
    assert "Unsupported data format" in err


def test_a_hub_name_without_a_network_says_so(capsys) -> None:
    assert main(["estimate", "--model", "nobody/nothing-of-this-name"]) == 2
    err = capsys.readouterr().err
    assert "There is no folder 'nobody/nothing-of-this-name' here, and the hub could not be asked" in err


def test_a_configuration_file_gives_what_has_no_flag(tool, tmp_path: Path) -> None:
    config = tmp_path / "lora.yaml"
    floors = []
    for rank in (4, 64):
        config.write_text(f"fine_tune_type: lora\nlora_parameters:\n  rank: {rank}\n  scale: 10.0\n  dropout: 0.0\n")
        floors.append(json.loads(tool("estimate", "--config", str(config), "--json")[1])["by_purpose"]["optimizer"])
    assert floors[1] > 10 * floors[0]


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n"])
def test_a_configuration_file_that_is_none_is_named(tool, tmp_path: Path, text: str) -> None:
    config = tmp_path / "lora.yaml"
    config.write_text(text)
    code, _, err = tool("estimate", "--config", str(config))
    assert code == 2
    assert str(config) in err
