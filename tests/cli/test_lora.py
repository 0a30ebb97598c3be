from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.lora import CONFIG_DEFAULTS, build_parser
from mlx_lm.lora import run as plain_run

from mlx_tune.cli import build_parser as whole_parser
from mlx_tune.cli import main


@pytest.fixture
def lora(model_folder, data_folder, tmp_path, capsys):
    """Run `mlx-tune lora` on the toy model; returns its exit code, standard output and standard error."""

    def call(*options: str, data: bool = True) -> tuple[int, str, str]:
        words = ["lora", "--model", str(model_folder("tied")), "--adapter-path", str(tmp_path / "adapters")]
        words += ["--data", str(data_folder)] if data else []
        code = main([*words, *options])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SHORT = [
    "--train",
    "--max-seq-length",
    "33",
    "--iters",
    "4",
    "--steps-per-report",
    "2",
    "--num-layers",
    "2",
    "--val-batches",
    "1",
]


def test_every_flag_of_mlx_lm_is_taken() -> None:
    parser = whole_parser()
    for action in build_parser()._actions:
        for flag in action.option_strings:
            if flag in ("-h", "--help"):
                continue
            value = [] if action.nargs == 0 else [str(action.choices[0]) if action.choices else "1"]
            parsed = parser.parse_args(["lora", flag, *value])
            assert getattr(parsed, action.dest) is not None, flag


@pytest.mark.cpu_only
def test_without_auto_it_trains_what_mlx_lm_trains(lora, model_folder, data_folder, tmp_path) -> None:
    from types import SimpleNamespace

    given = {
        "model": str(model_folder("tied")),
        "data": str(data_folder),
        "train": True,
        "iters": 4,
        "steps_per_report": 2,
        "num_layers": 2,
        "val_batches": 1,
        "adapter_path": str(tmp_path / "theirs"),
        "learning_rate": 1e-2,
        "max_seq_length": 33,
    }
    plain_run(SimpleNamespace(**(CONFIG_DEFAULTS | given)))
    code, out, _ = lora(*SHORT, "--learning-rate", "1e-2", "--plain-loss")
    assert code == 0
    assert "4 iterations of 4 rows" in out
    assert "loss: plain, as asked for" in out
    ours, theirs = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("adapters", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)
    written, expected = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapters", "theirs")
    )
    assert {name: written[name] for name in expected if name != "adapter_path"} == {
        name: value for name, value in expected.items() if name != "adapter_path"
    }
    code, out, _ = lora(*SHORT, "--learning-rate", "1e-2")
    assert code == 0
    assert "loss: linear: logits of model.embed_tokens a few tokens at a time" in " ".join(out.split())
    assert "(it holds the logits of the whole batch; here" in " ".join(out.split())
    model, _ = mlx_lm.load(str(model_folder("tied")), adapter_path=str(tmp_path / "adapters"))
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])).astype(mx.float32))).all()


def plain_command(out: str) -> list[str]:
    """The words of the plain command that is printed."""
    lines = out.replace("\\\n", " ").splitlines()
    return next(line for line in lines if line.strip().startswith("mlx_lm.lora ")).split()


def test_the_fastest_batch_is_chosen_said_and_trained_with(lora, tmp_path) -> None:
    code, out, _ = lora(*SHORT, "--batch-size", "auto", "--memory-budget", "100MB", "--test")
    assert code == 0
    assert "Trainable parameters: " in out
    assert "mlx-lm's default batch" in out
    command = plain_command(out)
    assert command[-2] == "--batch-size"
    assert 1 <= int(command[-1]) <= 12  # the validation set has twelve rows
    assert "--memory-budget" not in command
    assert f"4 iterations of {command[-1]} rows" in out
    assert "0 blocks checkpointed" in out
    assert "Test loss" in out
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["batch_size"] == int(command[-1])


def test_the_largest_batch_is_chosen_where_that_is_asked_for(lora) -> None:
    code, out, _ = lora(*SHORT, "--batch-size", "largest", "--grad-checkpoint", "--memory-budget", "100MB")
    assert code == 0
    assert plain_command(out)[-3:] == ["--batch-size", "12", "--grad-checkpoint"]
    assert "4 iterations of 12 rows" in out
    assert "3 blocks checkpointed" in out


def test_accumulation_that_was_asked_for_stays(lora, tmp_path) -> None:
    code, out, _ = lora(*SHORT, "--batch-size", "largest", "--grad-accumulation-steps", "2", "--memory-budget", "100MB")
    assert code == 0
    assert "4 iterations of 12 rows x 2 = 24 an update" in out
    assert plain_command(out).count("--grad-accumulation-steps") == 1
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["grad_accumulation_steps"] == 2


def test_json_is_all_that_standard_output_holds(lora) -> None:
    code, out, err = lora(*SHORT, "--json", "--test")
    answer = json.loads(out)
    assert code == 0
    assert answer["batch_size"] == 4
    assert answer["test_loss"] > 0
    assert "The plain command" in err


def test_checkpoints_are_chosen_for_a_given_batch(lora) -> None:
    code, out, _ = lora(*SHORT, "--batch-size", "4", "--grad-checkpoint", "auto", "--memory-budget", "100MB")
    assert code == 0
    assert "Checkpoint plan at batch size 4: " in out


def test_everything_is_chosen_together(lora) -> None:
    code, out, _ = lora(
        *SHORT, "--batch-size", "auto", "--grad-checkpoint", "auto", "--memory-budget", "100MB", "--target-batch", "4"
    )
    assert code == 0
    assert "The plain command that comes nearest:" in out
    text = " ".join(out.split())
    (loss,) = {loss for loss in ("plain", "linear") if f"blocks checkpointed, {loss} loss, " in text}
    assert f"loss: {loss}" in text
    assert ("(it holds the logits of the whole batch; here" in text) == (loss == "linear")


def test_a_configuration_file_may_say_auto(lora, tmp_path) -> None:
    config = tmp_path / "lora.yaml"
    config.write_text(
        "train: true\niters: 2\nbatch_size: auto\ngrad_checkpoint: auto\nmemory_budget: 100MB\nnum_layers: 1\n"
        "val_batches: 1\nmax_seq_length: 33\n"
    )
    code, out, _ = lora("--config", str(config))
    assert code == 0
    assert "blocks checkpointed" in out
    command = plain_command(out)
    rows = command[command.index("--batch-size") + 1]
    assert f"2 iterations of {rows} rows" in out
    # mlx_lm.lora would take the word auto for a yes.
    assert ("--grad-checkpoint" in command) != ("take grad_checkpoint out of the configuration file" in out)


def test_the_longest_row_is_found_said_and_trained_with(lora, tmp_path) -> None:
    options = ["auto" if word == "33" else word for word in SHORT]
    code, out, _ = lora(*options, "--batch-size", "1", "--memory-budget", "1GB")
    assert code == 0
    assert "fit 1.00 GB: plain. A step held" in out
    length = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["max_seq_length"]
    assert f"Rows of {length} tokens" in out
    words = plain_command(out)
    assert words[-2:] != ["--max-seq-length", "auto"]
    assert "no row cut" in out


def test_rows_that_are_cut_are_said_before_the_training(lora) -> None:
    code, out, _ = lora(*(word if word != "33" else "8" for word in SHORT))
    assert code == 0
    assert 0 <= out.index("Of the training rows, ") < out.index("rows cut at 8 tokens: ") < out.index("nearest:")
    assert "training rows: " in out


def test_testing_alone_loads_the_adapters(lora) -> None:
    assert lora(*SHORT)[0] == 0
    code, out, _ = lora("--test")
    assert code == 0
    assert "Test loss" in out


def test_what_does_not_fit_is_bad_news(lora, tmp_path) -> None:
    code, _, err = lora(*SHORT, "--batch-size", "auto", "--memory-budget", "500kB")
    assert code == 1
    assert "500 kB" in err.splitlines()[-1]
    assert not (tmp_path / "adapters" / "adapters.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "give --train, --test or both"),
        (["--train", "--memory-budget", "1GB"], "--memory-budget has nothing to decide"),
        (["--train", "--target-batch", "8"], "--target-batch is what --batch-size auto aims at"),
        (["--test"], "cannot be loaded"),
        (["--train", "--report-to", "nobody"], "report_to='nobody'"),
        (["--train", "--resume-adapter-file", "nowhere.safetensors"], "resume_adapter_file='nowhere.safetensors'"),
        (["--train", "--batch-size", "100"], "batch_size=100 is more than the data has"),
        (["--train", "--batch-size", "largest", "--grad-checkpoint", "auto"], "goes by speed and --batch-size largest"),
        (["--train", "--batch-size", "auto", "--memory-budget", "much"], "'much'"),
        (["--train", "--adapter-path", "/dev/null/adapters"], "--adapter-path '/dev/null/adapters/adapters"),
    ],
)
def test_bad_input_is_one_line(lora, options: list[str], text: str) -> None:
    code, _, err = lora(*options)
    assert code == 2
    assert text in err.splitlines()[-1]


@pytest.mark.parametrize(
    "options", [["--batch-size", "many"], ["--batch-size", "0"], ["--grad-checkpoint", "some"], ["--x"]]
)
def test_flags_that_are_none_are_named_with_the_usage(lora, options: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        lora("--train", *options)
    assert caught.value.code == 2
    assert "mlx-tune lora" in capsys.readouterr().err


def test_help_shows_both_sets_of_options_and_examples(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["lora", "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    for text in ("--memory-budget", "--fine-tune-type", "mlx_lm.lora's own options:", "examples:"):
        assert text in out


def test_ctrl_c_leaves_no_half_of_a_file(model_folder, data_folder, tmp_path) -> None:
    adapters = tmp_path / "adapters"
    words = ["lora", "--model", str(model_folder("tied")), "--data", str(data_folder), "--train", "--num-layers", "1"]
    words += ["--iters", "100000", "--save-every", "2", "--adapter-path", str(adapters), "--val-batches", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_tune", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        deadline = time.monotonic() + 120
        while not (adapters / "0000004_adapters.safetensors").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)  # nothing to wait on: another process writes the file
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.endswith("mlx-tune lora: interrupted\n")
    files = sorted(adapters.iterdir())
    assert len(files) >= 4
    for file in files:
        assert not file.name.startswith(".")
        if file.suffix == ".safetensors":
            mx.eval(mx.load(str(file)))
