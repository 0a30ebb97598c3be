"""Small models for the measurements: mlx-lm's architectures at toy sizes, and a few that are not language models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

VOCABULARY = 512


def language_model(family: str, **sizes: Any) -> nn.Module:
    """A language model of mlx-lm's `family` at a toy size; `sizes` overrides fields of its config."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    return module.Model(module.ModelArgs.from_dict(configuration(family, **sizes)))


def configuration(family: str, **sizes: Any) -> dict[str, Any]:
    """The settings of such a model; lists with an entry for each block are repeated where `sizes` asks for more."""
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    config |= (FAMILIES[family] if family in FAMILIES else _EXPERTS | EXPERTS.get(family, {})) | sizes
    blocks = config["num_hidden_layers"]
    if config.get("layer_types"):
        config["layer_types"] = (config["layer_types"] * blocks)[:blocks]
    if "is_moe_layer" in config:
        config["is_moe_layer"] = [False] + [True] * (blocks - 1)
    return config


# What an architecture needs beside the sizes above.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32.0},
    "gemma3_text": {"query_pre_attn_scalar": 32.0, "sliding_window": 64, "sliding_window_pattern": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 128,
        "block_ff_dim": 384,
        "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_d_head": 32,
        "mamba_n_heads": 4,
        "mamba_d_state": 32,
        "mamba_chunk_size": 64,
        "num_hidden_layers": 2,
    },
    "mamba2": {
        "num_heads": 8,
        "head_dim": 32,
        "intermediate_size": 256,
        "state_size": 32,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": (0.0, 100.0),
        "time_step_rank": "auto",
        "num_hidden_layers": 2,
    },
}

# Mixtures of experts, in the names that one or the other architecture has for the same thing.
_EXPERTS: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "moe_layer_freq"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "sliding_window": 64,
    "partial_rotary_factor": 1.0,
    "rotary_dim": 16,
    "rope_scaling": None,
    "attention_multiplier": 0.1,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 8.0,
}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek": {},
    "deepseek_v2": {"topk_method": "gready", "rope_scaling": {"type": "yarn", "factor": 1.0, "mscale_all_dim": 0}},
    "deepseek_v3": {},
    "glm4_moe": {},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "laguna": {},
    "qwen2_moe": {},
    "qwen3_next": {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 3,
        "full_attention_interval": 2,
    },
    "mixtral": {},
    "gpt_oss": {},
    "olmoe": {"num_key_value_heads": 4},
    "phimoe": {},
    "granitemoe": {},
    "granitemoehybrid": {"layer_types": ["attention"] * 3},
    "minimax": {},
    "dots1": {},
    "ernie4_5_moe": {},
    "lfm2_moe": {
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "bailing_moe": {},
    "Klear": {},
    "afmoe": {"layer_types": _LAYERS},
    "exaone_moe": {"layer_types": _LAYERS, "is_moe_layer": [False, True, True]},
    "solar_open": {},
}


class ConvNet(nn.Module):
    """Images of [batch, height, width, 3] to ten classes, with batch norm and pooling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = [
            nn.Sequential(
                nn.Conv2d(3 if depth == 0 else width << (depth - 1), width << depth, 3, padding=1),
                nn.BatchNorm(width << depth),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for depth in range(3)
        ]
        self.head = nn.Linear(width << 2, 10)

    def __call__(self, images: mx.array) -> mx.array:
        for layer in self.layers:
            images = layer(images)
        return self.head(images.mean(axis=(1, 2)))


class Recurrent(nn.Module):
    """Sequences of [batch, length, width] to ten classes with an `nn.GRU` or an `nn.LSTM`."""

    def __init__(self, cell: type[nn.Module], width: int = 48, hidden: int = 96) -> None:
        super().__init__()
        self.cell = cell(width, hidden)
        self.head = nn.Linear(hidden, 10)

    def __call__(self, x: mx.array) -> mx.array:
        hidden = self.cell(x)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(hidden[:, -1])


class Translator(nn.Module):
    """`nn.Transformer` from source to target tokens, both [batch, length]."""

    def __init__(self, width: int = 96, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.transformer = nn.Transformer(
            width, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, mlp_dims=4 * width, dropout=dropout
        )
        self.head = nn.Linear(width, VOCABULARY)

    def __call__(self, source: mx.array, target: mx.array) -> mx.array:
        length = target.shape[1]
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length)
        return self.head(self.transformer(self.embedding(source), self.embedding(target), None, mask, None))


@mx.custom_function
def squared_relu(x: mx.array) -> mx.array:
    """The square of what is above zero, whose gradient needs the input and nothing in between."""
    return mx.square(mx.maximum(x, 0))


@squared_relu.vjp
def _squared_relu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    return 2 * mx.maximum(x, 0) * cotangent


class Perceptron(nn.Module):
    """Vectors of [batch, 256] to ten classes through four hidden layers."""

    def __init__(
        self, width: int = 512, dropout: float = 0.0, activation: Callable[[mx.array], mx.array] = nn.gelu
    ) -> None:
        super().__init__()
        self.layers = [nn.Linear(256 if depth == 0 else width, width) for depth in range(4)]
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 10)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = self.dropout(self.activation(layer(x)))
        return self.head(x)
