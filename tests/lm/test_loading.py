from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_tune as mt
from mlx_tune import lm


def arrays(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


@pytest.mark.parametrize("name", ["tied", "untied", "moe", "sharded"])
def test_loading_gives_model_configuration_and_folder(model_folder, name: str) -> None:
    model, tokenizer, config, folder = lm.load(model_folder(name), lazy=True)
    assert len(model.layers) == 3
    assert tokenizer.eos_token_id == 0
    assert config["vocab_size"] == 320
    assert folder == model_folder(name)


def test_a_lazy_model_stays_on_disk(model_folder) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    model, *_ = lm.load(model_folder("untied"), lazy=True)
    size = sum(value.nbytes for value in arrays(model).values())
    assert mx.get_active_memory() - before < 0.1 * size
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before > 0.9 * size


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "nobody/nothing"])
def test_a_hub_name_without_a_network_says_so(name: str) -> None:
    with pytest.raises(mt.MlxTuneError, match=r"no folder .* here, and the hub could not be asked.*Check the network"):
        lm.load(name)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there_is_no_hub_name(path: str) -> None:
    with pytest.raises(mt.InvalidArgumentError, match="There is no folder"):
        lm.load(path)


def test_folders_that_hold_no_model_are_named(model_folder, tmp_path: Path) -> None:
    with pytest.raises(mt.InvalidArgumentError, match=r"holds no config\.json"):
        lm.load(tmp_path)
    config = json.loads((model_folder("tied") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mt.InvalidArgumentError, match="its weights are missing"):
        lm.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(mt.MlxTuneError, match="mlx-lm cannot load"):
        lm.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((model_folder("tied") / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "of-another-kind"}))
    with pytest.raises(mt.MlxTuneError, match="of-another-kind"):
        lm.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(mt.MlxTuneError, match="mlx-lm cannot load"):
        lm.load(tmp_path)


def test_arguments_of_mlx_lms_loader_reach_it(model_folder) -> None:
    model, _, config, _ = lm.load(model_folder("tied"), model_config={"rope_theta": 123.0})
    assert config["rope_theta"] == model.args.rope_theta == 123.0
