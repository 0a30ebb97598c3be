from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.cli import main
from mlx_tune.cli.quantize import parse_override


@pytest.fixture
def text(data_folder: Path) -> str:
    return str(data_folder / "train.jsonl")


def quantize(*words: object) -> int:
    return main(["quantize", *map(str, words)])


@pytest.mark.parametrize("model", ["tied", "untied", "moe", "sharded"])
def test_every_kind_of_folder_becomes_one_that_mlx_lm_loads(model_folder, tmp_path: Path, capsys, model: str) -> None:
    target = tmp_path / "out"
    assert quantize("--model", model_folder(model), "--mlx-path", target, "--bits", 4, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    loaded, _ = mlx_lm.load(str(target))
    size = sum(value.nbytes for _, value in tree_flatten(loaded.parameters()))
    assert size == report["size_after_bytes"] < report["size_before_bytes"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]  # nothing of the writing is left


def test_a_report_with_accuracy_is_written_whole(model_folder, text, tmp_path: Path, capsys) -> None:
    report = tmp_path / "reports" / "report.json"
    words = ["--evaluation", text, "--sequence-length", 32, "--evaluation-samples", 4, "--report", report]
    assert quantize("--model", model_folder("tied"), "--mlx-path", tmp_path / "out", *words) == 0
    written = json.loads(report.read_text())
    assert written["accuracy"]["mean_kl"] >= 0
    assert [file.name for file in report.parent.iterdir()] == ["report.json"]
    out = capsys.readouterr().out
    assert f"Cost: mean KL {written['accuracy']['mean_kl']:.1f}"[:14] in out
    assert "same next token" in out
    assert "perplexity" in out


def test_it_ends_with_what_was_made_and_what_to_do_next(model_folder, tmp_path: Path, capsys) -> None:
    target, picture = tmp_path / "out", tmp_path / "layers.svg"
    place = ["--model", model_folder("tied"), "--mlx-path", target, "--skip", "*.layers.0.*"]
    assert quantize(*place, "--plot", picture) == 0
    out, err = capsys.readouterr()
    words = " ".join(out.split())
    assert f"Made {target} " in words
    assert "bits per weight" in words
    assert "layers by optimal" in words
    assert "left as they are" in words
    assert "Cost: not measured. --evaluation FILE measures it" in words
    assert f"mlx_lm.generate --model {target} --prompt TEXT" in words.replace("\\ ", "")
    assert "SNR dB" not in out  # the long table
    assert f"picture in {picture}" in err
    assert picture.is_file()


def test_a_dtype_is_the_weights_and_the_scales(model_folder, tmp_path: Path, capsys) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        target = tmp_path / dtype
        assert quantize("--model", model_folder("tied"), "--mlx-path", target, "--dtype", dtype, "--json") == 0
        sizes[dtype] = json.loads(capsys.readouterr().out)["size_after_bytes"]
        loaded, _ = mlx_lm.load(str(target))
        flat = dict(tree_flatten(loaded.parameters()))
        assert {str(value.dtype) for path, value in flat.items() if not path.endswith(".weight") or "norm" in path} == {
            f"mlx.core.{dtype}"
        }
    assert sizes["bfloat16"] < sizes["float32"]


def test_verbose_prints_every_layer_before_the_end(model_folder, tmp_path: Path, capsys) -> None:
    assert quantize("--model", model_folder("tied"), "--mlx-path", tmp_path / "out", "--verbose") == 0
    table, _, end = capsys.readouterr().out.partition("\nMade ")
    assert table.startswith("Quantization report")
    assert "model.layers.2.mlp.up_proj" in table
    assert "--verbose" not in end


def test_the_folder_has_the_model_card_that_mlx_lm_writes(model_folder, tmp_path: Path) -> None:
    from mlx_lm.utils import save

    assert quantize("--model", model_folder("tied"), "--mlx-path", tmp_path / "ours") == 0
    model, tokenizer, config = mlx_lm.load(str(tmp_path / "ours"), return_config=True)
    save(tmp_path / "theirs", tmp_path / "ours", model, tokenizer, config)
    assert (tmp_path / "ours" / "README.md").read_text() == (tmp_path / "theirs" / "README.md").read_text()
    assert "library_name: mlx" in (tmp_path / "ours" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "methods", "heard"),
    [
        (["--method", "gptq"], {"gptq", "optimal", "nearest"}, "gptq"),
        (["--method", "dwq"], {"dwq", "gptq", "optimal", "nearest"}, "dwq"),
        (["--method", "nearest", "--target-bpw", 5], {"nearest"}, "measuring sensitivity"),
    ],
    ids=["gptq", "dwq", "target"],
)
def test_every_method_learns_from_a_file(model_folder, text, tmp_path: Path, capsys, words, methods, heard) -> None:
    learn = ["--calibration", text, "--num-samples", 6, "--batch-size", 2, "--sequence-length", 24]
    place = ["--model", model_folder("tied"), "--mlx-path", tmp_path / "out"]
    assert quantize(*place, "--bits", 3, *words, *learn, "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert f"{heard}: " in err
    assert {layer["method"] for layer in report["layers"]} <= methods
    if "--target-bpw" in words:
        assert 3 < report["bits_per_weight"] <= 5
        assert len({layer["bits"] for layer in report["layers"]}) > 1
    loaded, _ = mlx_lm.load(str(tmp_path / "out"))
    assert sum(v.nbytes for _, v in tree_flatten(loaded.parameters())) == report["size_after_bytes"]


def test_a_plan_changes_and_writes_nothing(model_folder, tmp_path: Path, capsys) -> None:
    words = ["--model", model_folder("tied"), "--plan", "--override", "*.q_proj=bits:8", "--skip", "*.layers.0.*"]
    assert quantize(*words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    widths = {layer["path"]: layer["bits"] for layer in plan["layers"]}
    assert widths["model.layers.1.self_attn.q_proj"] == 8
    assert widths["model.layers.1.self_attn.k_proj"] == 4
    assert "model.layers.0.self_attn.q_proj" not in widths
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("*.lm_head=bits:8", ("*.lm_head", {"bits": 8})),
        ("a=bits:8,group_size:32,mode:affine", ("a", {"bits": 8, "group_size": 32, "mode": "affine"})),
        ("a=true", ("a", True)),
        ("a=false", ("a", False)),
    ],
)
def test_overrides_are_read(value: str, expected) -> None:
    assert parse_override(value) == expected


@pytest.mark.parametrize("value", ["", "a", "=bits:8", "a=", "a=bits", "a=bits:x", "a=bits:8,", "a=width:3", "a=8"])
def test_overrides_that_are_none_are_named(value: str) -> None:
    with pytest.raises(mt.InvalidArgumentError, match="give PATTERN=bits:8"):
        parse_override(value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "Name the new folder with --mlx-path"),
        (["--mlx-path", "out", "--method", "gptq"], "--method gptq learns from text"),
        (["--mlx-path", "out", "--bits", "7"], "bits=7"),
        (["--mlx-path", "out", "--calibration", "nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["--mlx-path", "taken"], "is there already and not empty"),
        (["--mlx-path", "out", "--override", "lm_head"], "--override 'lm_head'"),
        (["--plan", "--plot", "layers.svg"], "--plan measures nothing"),
        (["--mlx-path", "out", "--plot", "layers.gif"], "must end in .svg or .png"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(model_folder, tmp_path, monkeypatch, capsys, words, text) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert quantize("--model", model_folder("tied"), *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing_half_written(model_folder, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    for place in ("mlx_lm.utils.save_config", "mlx_tune.quantization.quantize.carry_out"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupted)
            code = quantize("--model", model_folder("tied"), "--mlx-path", tmp_path / "out", "--report", tmp_path / "r")
        assert code == 130
        assert list(tmp_path.iterdir()) == []
        assert capsys.readouterr().err.endswith("mlx-tune quantize: interrupted\n")


def test_quantizing_again_is_refused_unless_asked_for(model_folder, tmp_path: Path, capsys) -> None:
    assert quantize("--model", model_folder("wide"), "--mlx-path", tmp_path / "a", "--bits", 8) == 0
    assert quantize("--model", tmp_path / "a", "--mlx-path", tmp_path / "b") == 2
    assert "requantize" in capsys.readouterr().err
    assert quantize("--model", tmp_path / "a", "--mlx-path", tmp_path / "b", "--requantize") == 0
    loaded, *_ = lm.load(tmp_path / "b")
    assert loaded.layers[0].mlp.up_proj.bits == 4


def test_kernels_are_tried_unless_told_not_to(model_folder, tmp_path: Path, capsys, monkeypatch) -> None:
    from mlx_tune.quantization.planning import kernel_trials

    def multiply(*arrays, **parts):
        raise RuntimeError("[quantized_matmul] No implementation for problem shape")

    monkeypatch.setattr(kernel_trials, "MLX", kernel_trials.Kernels(multiply=multiply))
    words = ["--model", model_folder("tied"), "--mlx-path", tmp_path / "out"]
    assert quantize(*words) != 0
    assert "No layer can be packed as asked" in capsys.readouterr().err
    assert quantize(*words, "--no-verify-kernels") == 0


@pytest.mark.parametrize("method", ["optimal", "gptq"])
def test_a_model_that_does_not_fit_goes_from_folder_to_folder(
    model_folder, tmp_path: Path, capsys, monkeypatch, text, method
) -> None:
    words = ["--model", model_folder("untied"), "--bits", 3, "--override", "*.down_proj=bits:8"]
    if method == "gptq":
        words += ["--method", method, "--calibration", text, "--sequence-length", 32, "--num-samples", 8]
    assert quantize(*words, "--mlx-path", tmp_path / "in-memory") == 0
    capsys.readouterr()
    monkeypatch.setattr("mlx_tune.lm.quantizing.quantize_folder.memory_budget", lambda: 1 << 16)
    picture = tmp_path / "layers.svg"
    assert quantize(*words, "--mlx-path", tmp_path / "out", "--evaluation", text, "--plot", picture) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The model does not fit in memory, so that it was quantized from folder to folder, and what that cost" in out
    assert picture.is_file()
    (first,), (second,) = ((tmp_path / name).glob("*.safetensors") for name in ("in-memory", "out"))
    a, b = mlx_lm.load(str(first.parent))[0], mlx_lm.load(str(second.parent))[0]
    ours, theirs = dict(tree_flatten(a.parameters())), dict(tree_flatten(b.parameters()))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("words", [["--target-bpw", 5], ["--method", "dwq", "--calibration", "TEXT"], ["--plan"]])
def test_what_needs_the_whole_model_stays_in_memory(
    model_folder, text, tmp_path: Path, capsys, monkeypatch, words
) -> None:
    monkeypatch.setattr("mlx_tune.lm.quantizing.quantize_folder.memory_budget", lambda: 1 << 16)
    words = [text if word == "TEXT" else word for word in words]
    lengths = ["--sequence-length", 32, "--num-samples", 4]
    assert quantize("--model", model_folder("tied"), "--mlx-path", tmp_path / "out", *words, *lengths) == 0
    assert "from folder to folder" not in capsys.readouterr().out
