"""What is saved is what stock mlx-lm loads, to the bit, and it has the report's perplexity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.quantization.judging.evaluation import perplexity
from mlx_tune.quantization.models.batches import read_batches

FORMATS: dict[str, dict[str, Any]] = {
    "uniform": {"bits": 4, "group_size": 64},
    "three bits, groups of 32": {"bits": 3, "group_size": 32},
    "mixed": {
        "bits": 4,
        "overrides": {"*.v_proj": {"bits": 6, "group_size": 32}, "*.o_proj": {"mode": "mxfp8"}, "*.0.*.up_proj": False},
    },
    "to a size": {"target_bpw": 4.2, "method": "nearest"},
    "narrow scales": {"bits": 4, "group_size": 64, "scale_dtype": "float16"},
    "mxfp4": {"mode": "mxfp4"},
    "mxfp8": {"mode": "mxfp8"},
    "nvfp4": {"mode": "nvfp4"},
}


def save_and_load(model: nn.Module, folder: Path) -> nn.Module:
    from mlx_lm.utils import load_model

    config = {k: v for k, v in dataclasses.asdict(model.args).items() if v is not None}
    source = folder / "source"
    source.mkdir()
    saved = mt.lm.save_quantized(folder / "saved", model, config=config, source=source)
    loaded, _ = load_model(saved)
    return loaded


@pytest.mark.parametrize("chosen", FORMATS.values(), ids=FORMATS)
def test_what_is_loaded_is_what_was_saved(chosen: dict[str, Any], tmp_path: Path) -> None:
    model = toys.llama(tied=False)
    batches = [toys.tokens(seed=3)]
    report = mt.quantize_model(model, evaluation=batches, progress=False, **chosen)
    loaded = save_and_load(model, tmp_path)
    assert toys.same_arrays(toys.arrays_of(model), toys.arrays_of(loaded))
    found = perplexity(loaded, read_batches(batches, "evaluation"))
    assert found == pytest.approx(report.accuracy.perplexity_after, rel=1e-5)
    again = mt.quantization_report(loaded, toys.llama(tied=False), batches)
    assert again.accuracy.perplexity_after == pytest.approx(report.accuracy.perplexity_after, rel=1e-5)
    assert again.bits_per_weight == report.bits_per_weight


@pytest.mark.parametrize("make", [toys.llama, toys.qwen3_moe, toys.gemma2, toys.lfm2])
def test_other_families(make, tmp_path: Path) -> None:
    model = make()
    mt.quantize_model(model, 4, 64, method="nearest", progress=False)
    loaded = save_and_load(model, tmp_path)
    assert toys.same_arrays(toys.arrays_of(model), toys.arrays_of(loaded))


@pytest.mark.parametrize("name", toys.FAMILIES)
def test_experts_biases_latent_attention_and_state_spaces(name: str, tmp_path: Path) -> None:
    model = toys.family(name)
    batches = [toys.tokens(seed=3)]
    plan = mt.plan_quantization(model, 4, 32)
    report = mt.quantize_model(model, 4, 32, evaluation=batches, progress=False)
    assert plan.size_after_bytes == report.size_after_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    assert 0 < report.accuracy.mean_kl < 0.1
    assert report.accuracy.non_finite == 0
    loaded = save_and_load(model, tmp_path)
    assert toys.same_arrays(toys.arrays_of(model), toys.arrays_of(loaded))
    found = perplexity(loaded, read_batches(batches, "evaluation"))
    assert found == pytest.approx(report.accuracy.perplexity_after, rel=1e-5)


def test_several_files(tmp_path: Path, monkeypatch) -> None:
    import mlx_lm.utils

    def one_each(weights: dict[str, Any], *_: Any) -> list[dict[str, Any]]:
        return [{name: array} for name, array in weights.items()]

    monkeypatch.setattr(mlx_lm.utils, "make_shards", one_each)
    model = toys.llama()
    mt.quantize_model(model, 4, 64, overrides={"*.down_proj": {"bits": 8}}, progress=False)
    loaded = save_and_load(model, tmp_path)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 10
    assert toys.same_arrays(toys.arrays_of(model), toys.arrays_of(loaded))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["model.layers.0.mlp.down_proj"]["bits"] == 8
