from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune import lm

TOKENS = mx.arange(24).reshape(2, 12)


def arrays(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("name", ["tied", "untied", "moe", "sharded"])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 3, "group_size": 32, "overrides": {"*.q_proj": {"bits": 8}, "*.layers.1.*": False}},
        {"mode": "mxfp4", "method": "nearest"},
    ],
    ids=["uniform", "mixed", "mxfp4"],
)
def test_stock_mlx_lm_loads_what_was_saved(model_folder, tmp_path: Path, name: str, options: dict) -> None:
    model, tokenizer, config, folder = lm.load(model_folder(name))
    mt.quantize_model(model, **options, progress=False)
    saved = lm.save_quantized(tmp_path / "out", model, tokenizer, config, source=folder)
    loaded, loaded_tokenizer = mlx_lm.load(str(saved))
    ours, theirs = arrays(model), arrays(loaded)
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype
        assert mx.array_equal(value.view(mx.uint8), theirs[path].view(mx.uint8)), path
    if name != "moe":  # the CPU has no bfloat16 experts
        assert mx.array_equal(model(TOKENS), loaded(TOKENS))
    assert loaded_tokenizer.encode("memory can be planned") == tokenizer.encode("memory can be planned")
    described = json.loads((saved / "config.json").read_text())
    assert described["quantization"] == described["quantization_config"]


def test_the_source_gives_configuration_tokenizer_and_companions(model_folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in model_folder("tied").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "generation_config.json").write_text("{}")
    (source / "custom.py").write_text("")
    model, *_ = lm.load(source)
    nn.quantize(model, 64, 8)
    saved = lm.save_quantized(tmp_path / "out", model, source=source)
    names = {file.name for file in saved.iterdir()}
    assert {"generation_config.json", "custom.py", "tokenizer.json", "tokenizer_config.json"} <= names
    assert saved.stat().st_mode & 0o077 == 0o055  # readable by others
    mlx_lm.load(str(saved))


def test_a_failure_leaves_no_folder(model_folder, tmp_path: Path, monkeypatch) -> None:
    model, tokenizer, config, _ = lm.load(model_folder("tied"))
    nn.quantize(model, 64, 8)
    monkeypatch.setattr("mlx_lm.utils.save_config", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm.save_quantized(tmp_path / "deep" / "out", model, tokenizer, config)
    assert list((tmp_path / "deep").iterdir()) == []


def test_bad_input_is_named_and_writes_nothing(model_folder, tmp_path: Path) -> None:
    model, tokenizer, config, folder = lm.load(model_folder("tied"))
    quantized, *_ = lm.load(model_folder("tied"))
    nn.quantize(quantized, 64, 8)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(mt.InvalidArgumentError, match="needs config="):
        lm.save_quantized(tmp_path / "out", quantized, tokenizer)
    with pytest.raises(mt.InvalidArgumentError, match="needs tokenizer="):
        lm.save_quantized(tmp_path / "out", quantized, config=config)
    with pytest.raises(mt.InvalidArgumentError, match="not empty"):
        lm.save_quantized(taken, quantized, tokenizer, config)
    with pytest.raises(mt.MlxTuneError, match="quantized"):
        lm.save_quantized(tmp_path / "out", model, tokenizer, config, source=folder)
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_adapters_that_are_not_fused_are_named(model_folder, tmp_path: Path) -> None:
    model, tokenizer, config, _ = lm.load(model_folder("tied"))
    lm.add_adapters(model, num_layers=-1)
    nn.quantize(model, 64, 8)
    with pytest.raises(mt.MlxTuneError, match=r"cannot load the model.*lora_a.*fuse them into its layers first"):
        lm.save_quantized(tmp_path / "out", model, tokenizer, config)
    assert list(tmp_path.iterdir()) == []


def test_another_models_configuration_is_noticed(model_folder, tmp_path: Path) -> None:
    model, tokenizer, config, _ = lm.load(model_folder("tied"))
    nn.quantize(model, 64, 8)
    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    with pytest.raises(mt.MlxTuneError, match=r"Does config= belong to this model\?"):
        lm.save_quantized(tmp_path / "out", model, tokenizer, config | {"num_hidden_layers": 2})
    assert list(tmp_path.iterdir()) == []
    assert mx.random.uniform().item() == expected


def test_quantized_inputs_are_in_the_configuration(model_folder, tmp_path: Path) -> None:
    model, tokenizer, config, _ = lm.load(model_folder("untied"))
    nn.quantize(model, mode="nvfp4", quantize_input=True, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    model.eval()
    saved = lm.save_quantized(tmp_path / "out", model, tokenizer, config)
    assert json.loads((saved / "config.json").read_text())["quantize_activations"] is True
    loaded, _ = mlx_lm.load(str(saved))
    assert isinstance(loaded.lm_head, nn.QQLinear)
    assert all(mx.array_equal(a, arrays(loaded)[path]) for path, a in arrays(model).items())


def test_what_the_configuration_cannot_say_is_refused(model_folder, tmp_path: Path) -> None:
    model, tokenizer, config, _ = lm.load(model_folder("untied"))
    nn.quantize(model, mode="nvfp4", quantize_input=True, class_predicate=lambda path, _: path.endswith("up_proj"))
    nn.quantize(model, 64, 8, class_predicate=lambda path, _: path == "lm_head")
    with pytest.raises(mt.InvalidArgumentError, match=r"Some layers quantize their inputs, lm_head do not"):
        lm.save_quantized(tmp_path / "out", model, tokenizer, config)


def test_experts_with_a_scale_of_their_own(model_folder, tmp_path: Path) -> None:
    model, tokenizer, config, _ = lm.load(model_folder("moe"))
    scaled = {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
    nn.quantize(model, 64, 8, class_predicate=lambda _, m: isinstance(m, nn.Linear))
    nn.quantize(
        model, class_predicate=lambda path, m: scaled if hasattr(m, "to_quantized") and "switch" in path else False
    )
    saved = lm.save_quantized(tmp_path / "out", model, tokenizer, config)
    loaded, _ = mlx_lm.load(str(saved))
    assert loaded.layers[0].mlp.switch_mlp.up_proj.global_scale.shape == (4,)
    assert all(mx.array_equal(a, arrays(loaded)[path]) for path, a in arrays(model).items())


@pytest.fixture
def wrong_kernel(monkeypatch):
    """MLX's product with packed weights, spoilt from two rows on."""
    from mlx_tune.quantization.planning import kernel_trials

    def multiply(inputs, *arrays, **parts):
        right = mx.quantized_matmul(inputs, *arrays, **parts)
        return right if inputs.shape[-2] == 1 else right * math.nan

    monkeypatch.setattr(kernel_trials, "MLX", kernel_trials.Kernels(multiply=multiply))


@pytest.mark.parametrize("lazy", [False, True])
def test_what_mlx_computes_wrong_is_unpacked_when_loaded(model_folder, tmp_path: Path, wrong_kernel, lazy) -> None:
    model, tokenizer, config, folder = lm.load(model_folder("tied"))
    mt.quantize_model(model, 8, 32, verify_kernels=False, progress=False)
    saved = lm.save_quantized(tmp_path / "out", model, tokenizer, config, source=folder)
    with pytest.warns(UserWarning, match=r"8 rows is wrong on this backend.*layers were unpacked for it"):
        loaded, *_ = lm.load(saved, lazy=lazy)
    assert not [path for path, module in loaded.named_modules() if isinstance(module, nn.QuantizedLinear)]
    ours, theirs = (m(TOKENS).astype(mx.float32) for m in (loaded, model))
    assert mx.abs(ours - theirs).max() < 0.05 * mx.abs(theirs).max()


def test_it_stays_packed_where_that_was_asked_for(model_folder, tmp_path: Path, wrong_kernel) -> None:
    model, tokenizer, config, folder = lm.load(model_folder("tied"))
    mt.quantize_model(model, 8, verify_kernels=False, progress=False)
    saved = lm.save_quantized(tmp_path / "out", model, tokenizer, config, source=folder)
    loaded, *_ = lm.load(saved, verify_kernels=False)
    assert arrays(loaded).keys() == arrays(model).keys()
