"""Toy models on disk, built once: what mlx-lm loads, at sizes that train in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_tune.lm import small_model

WORDS = ["memory", "in", "a", "lazy", "graph", "can", "be", "planned", "before", "the", "allocator", "counts", "bytes"]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "eos_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": LLAMA,
    "wide": LLAMA | {"hidden_size": 128, "head_dim": 64},
    "untied": LLAMA | {"tie_word_embeddings": False},
    "moe": LLAMA
    | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
}


def sentence(seed: int, words: int) -> str:
    """Text of so many words, the same for the same seed."""
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(words))


def build_model(config: dict[str, Any], seed: int = 0) -> Any:
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_model.train_tokenizer([sentence(i, 40) for i in range(40)], 320, folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[[str], Path]:
    """The folder of a toy model, by the name of its config; "sharded" is "tied" in two files."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            folder = tmp_path_factory.mktemp(f"model-{name}")
            config = CONFIGS["tied" if name == "sharded" else name]
            weights = dict(tree_flatten(build_model(config).parameters()))
            names = sorted(weights)
            shards = 2 if name == "sharded" else 1
            index = {}
            for shard in range(shards):
                file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
                part = {key: weights[key] for key in names[shard::shards]}
                mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})
                index |= dict.fromkeys(part, file)
            if shards > 1:
                (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
            (folder / "config.json").write_text(json.dumps(config))
            for file in tokenizer_folder.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            built[name] = folder
        return built[name]

    return build


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl`, `valid.jsonl` and `test.jsonl` with rows of different lengths."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows, seed in (("train", 40, 0), ("valid", 12, 100), ("test", 8, 200)):
        lines = [json.dumps({"text": sentence(seed + i, 8 + 3 * (i % 12))}) for i in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def rows() -> list[tuple[list[int], int]]:
    """Thirty rows of tokens, the longest of 70."""
    return [([(7 * i + j) % 320 for j in range(10 + 2 * (i % 31))], 0) for i in range(31)]


@pytest.fixture
def toy() -> Callable[..., Any]:
    """A toy model in memory, with LoRA adapters where asked for."""

    def make(name: str = "tied", *, lora: bool = False, dropout: float = 0.0, dtype: mx.Dtype = mx.float32) -> Any:
        model = build_model(CONFIGS[name])
        model.set_dtype(dtype)
        if lora:
            from mlx_lm.tuner.utils import linear_to_lora_layers

            model.freeze()
            linear_to_lora_layers(model, 3, {"rank": 4, "scale": 10.0, "dropout": dropout})
        mx.eval(model.parameters())
        return model

    return make
