from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_tune.checkpointing import GradientDifference, VerifyReport
from mlx_tune.cli import main


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


@pytest.mark.parametrize("model", ["tied", "untied", "moe", "sharded"])
def test_estimate_takes_every_kind_of_folder(tool, model: str) -> None:
    code, out, _ = tool("estimate", "--batch-size", "2", model=model)
    assert code == 0
    assert out.startswith("Floor of the step: ")


def test_estimate_says_whether_it_fits(tool) -> None:
    code, out, _ = tool("estimate", "--memory-budget", "1GB")
    assert code == 0
    assert "The step fits within 1.00 GB: " in out
    code, out, _ = tool("estimate", "--memory-budget", "1MB", "--json")
    answer = json.loads(out)
    assert code == 1
    assert answer["fits"] is False
    assert answer["budget_bytes"] == 1_000_000 < answer["floor_bytes"]


def test_estimate_stands_in_for_data_that_is_not_there_yet(tool) -> None:
    floors = {}
    for length in (64, 128):
        code, out, _ = tool("estimate", "--max-seq-length", str(length), "--json", data=False)
        assert code == 0
        floors[length] = json.loads(out)["floor_bytes"]
    assert floors[128] > 1.5 * floors[64]


def test_estimate_counts_what_is_asked_for(tool) -> None:
    floors = {}
    for name, options in {
        "lora": [],
        "full": ["--fine-tune-type", "full"],
        "checkpointed": ["--grad-checkpoint"],
        "accumulated": ["--fine-tune-type", "full", "--grad-accumulation-steps", "4"],
    }.items():
        floors[name] = json.loads(tool("estimate", "--json", *options)[1])["floor_bytes"]
    assert floors["checkpointed"] < floors["lora"]
    assert floors["accumulated"] > floors["full"]


def test_estimate_draws(tool, tmp_path: Path) -> None:
    assert tool("estimate", "--plot", str(tmp_path / "memory.svg"))[0] == 0
    assert (tmp_path / "memory.svg").read_text().lstrip().startswith("<?xml")


def test_autobatch_prints_the_answer_and_nothing_else_as_json(tool) -> None:
    code, out, _ = tool("autobatch", "--memory-budget", "200MB", "--max-batch", "2", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["batch_size"] == 2
    assert answer["peak_bytes"] <= answer["budget_bytes"] == 200_000_000


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("estimate", "estimate: reading the step's graph"),
        ("autobatch", "autobatch: trying batch size 1"),
        ("checkpoint", "plan checkpoints: timing model.layers.0"),
        ("fit", "autofit: largest batch with every block checkpointed"),
    ],
)
def test_who_reads_a_log_hears_what_is_going_on(tool, command: str, line: str) -> None:
    batch = ["--max-batch", "1"] if command in ("autobatch", "fit") else ["--batch-size", "1"]
    code, out, err = tool(command, "--memory-budget", "1GB", "--json", *([] if command == "estimate" else batch))
    assert code == 0
    json.loads(out)
    assert any(said.startswith(line) for said in err.splitlines())
    assert "\x1b" not in err


def test_autobatch_takes_a_slowdown(tool) -> None:
    code, _, err = tool("autobatch", "--memory-budget", "200MB", "--max-batch", "2", "--slowdown", "-1")
    assert code == 2
    assert "slowdown=-1.0: give a share of at least 0" in err
    code, out, _ = tool("autobatch", "--memory-budget", "200MB", "--max-batch", "2", "--slowdown", "0.05")
    assert code == 0
    assert out.startswith("batch size 2: ")


def test_autobatch_gives_micro_batches_of_a_target(tool) -> None:
    code, out, _ = tool("autobatch", "--memory-budget", "200MB", "--max-batch", "3", "--target-batch", "8", "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["batch_size"], answer["accumulation_steps"]) == (2, 4)


@pytest.mark.parametrize("command", ["autobatch", "checkpoint"])
def test_what_does_not_fit_is_bad_news_and_not_an_error(tool, command: str) -> None:
    budget = mx.get_active_memory() + 1_000_000
    code, out, err = tool(command, "--memory-budget", str(budget))
    assert code == 1
    assert out == ""
    assert "fit" in err.splitlines()[-1]
    code, out, _ = tool(command, "--memory-budget", str(budget), "--json")
    answer = json.loads(out)
    assert code == 1
    assert answer["fits"] is False
    assert answer["needed_bytes"] > answer["budget_bytes"] == budget


def test_checkpoint_plans(tool) -> None:
    code, out, _ = tool("checkpoint", "--batch-size", "4", "--memory-budget", "1GB", "--json")
    answer = json.loads(out)
    assert code == 0
    assert len(answer["blocks"]) == 3


def test_checkpoint_verifies(tool) -> None:
    code, out, _ = tool("checkpoint", "--verify", "--batch-size", "1", "--max-seq-length", "33")
    assert code == 0
    assert out.startswith("3 checkpointed blocks against none")


@pytest.mark.parametrize(
    ("difference", "reason", "expected"), [(0.0, "", 0), (1.0, "", 1), (0.0, "the gradient is zero both ways", 3)]
)
def test_checkpoint_verify_has_an_exit_code_for_each_verdict(
    tool, monkeypatch, difference: float, reason: str, expected: int
) -> None:
    row = GradientDifference("w", 1.0, difference, 0.0, 1e-6, False, reason)
    report = VerifyReport(("layers.0",), 2.0, 0.0, 1e-6, (row,))
    monkeypatch.setattr("mlx_tune.lm.fitting.verify_checkpoint", lambda *_: report)
    code, out, _ = tool("checkpoint", "--verify", "--json")
    assert code == expected
    assert json.loads(out)["verdict"] == report.verdict


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
