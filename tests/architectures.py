"""Every architecture of mlx-lm's at a toy size, and how each of them is split for the loss without logits."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten
from workload_models import EXPERTS, FAMILIES, configuration, language_model

from mlx_tune.losses.splitting import SplitHead, split_head

_ROPE = {"type": "default", "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_ATTENTION = ["sliding_attention", "full_attention", "full_attention"]
#: The sizes of the toy models, in the names that one or the other architecture has for them.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("n_embd", "d_model", "model_dim", "hidden_dim", "dim_model_base", "moe_hidden_size"), 128),
    **dict.fromkeys(("n_inner", "ffn_hidden_size", "ff_intermediate_size", "intermediate_size_mlp"), 384),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "num_transformer_layers"), 3),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "num_query_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("n_kv_heads", "num_kv_heads", "swa_num_key_value_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("n_positions", "n_ctx", "block_size", "model_max_length"), 512),
    **dict.fromkeys(("layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon", "norm_eps", "post_norm_eps"), 1e-5),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "share_expert_dim"), 64),
    **dict.fromkeys(("moe_num_experts", "index_topk", "index_n_heads"), 4),
    **dict.fromkeys(("moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("rotary_emb_base", "swa_rope_theta", "rope_local_base_freq"), 10000.0),
    **dict.fromkeys(("post_norm", "qk_norm", "use_conv_bias", "mla_scale_q_lora", "mla_scale_kv_lora"), True),
    **dict.fromkeys(("use_qkv_bias", "mamba_proj_bias", "linear_allow_neg_eigval", "attention_bias"), False),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "index_head_dim", "swa_head_dim"), 32),
    **dict.fromkeys(("conv_kernel", "linear_conv_kernel_dim", "conv1d_width", "conv_window", "mamba_d_conv"), 4),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("sliding_window_pattern", "layer_group_size", "mamba_expand"), 2),
    "rotary_pct": 0.5,
    "swa_v_head_dim": 32,
    "group_norm_size": 4,
    "rope_parameters": _ROPE,
    "layer_types": _ATTENTION,
}
#: What an architecture needs beside them.
_OTHERS: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 1},
    "baichuan_m1": {"sliding_window_layers": [0], "conv_window": 2, "tie_word_embeddings": False},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "exaone4": {"sliding_window_pattern": "LLG"},
    "gear": {"query_pre_attn_scalar": 32.0, "final_logit_softcapping": 30.0},
    "gemma3n": {
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": 512,
        "final_logit_softcapping": 30.0,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 32,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "intermediate_size": [384] * 4,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 32,
        "global_head_dim": 32,
        "rope_parameters": None,
        "num_experts": None,
    },
    "gpt2": {"num_key_value_heads": 4},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "hunyuan": {
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        "num_shared_expert": [1] * 3,
        "use_mixed_mlp_moe": True,
        "use_cla": False,
        "cla_share_factor": 2,
        "moe_topk": [2] * 3,
        "moe_intermediate_size": [64] * 3,
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "full_attn_layers": [3],
            "num_heads": 4,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "num_key_value_heads": 4,
    },
    "llama4": {
        "attention_chunk_size": 64,
        "interleave_moe_layer_step": 1,
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
        "num_hidden_layers": 4,
    },
    "llama4_text": {"no_rope_layers": [1, 0, 1]},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2},
    "longcat_flash_ngram": {
        "zero_expert_num": 2,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 2,
        "emb_split_num": 2,
    },
    "mamba": {"time_step_rank": 8, "intermediate_size": 256},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 64,
        "partial_rotary_factor": 0.5,
    },
    "minicpm": {"scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 64},
    "minicpm3": {
        "scale_depth": 1.4,
        "scale_emb": 12,
        "dim_model_base": 64,
        "rope_scaling": {"original_max_position_embeddings": 512},
        "num_key_value_heads": 4,
    },
    "mellum": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "ministral3": {"rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512}},
    "mistral4": {
        "rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 512},
        "qk_head_dim": 32,
        "rope_interleave": True,
        "num_key_value_heads": 4,
    },
    "muse_spark": {
        "layer_rope_theta": [10000.0, 0, 10000.0],
        "final_logit_softcapping": 30.0,
        "output_multiplier": 0.5,
        "num_shared_experts": 0,
        "moe_hidden_size": 128,
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
        ]
        * 3,
    },
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "hybrid_override_pattern": ["M", "*", "-"],
        "layer_types": None,
        "time_step_limit": (0.0, 100.0),
    },
    "olmo3": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4},
    "olmo_hybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "openelm": {
        "ffn_dim_divisor": 32,
        "num_query_heads": [4] * 3,
        "num_kv_heads": [2] * 3,
        "ffn_multipliers": [1.0] * 3,
    },
    # The family writes to tokens of its own vocabulary, and past the end of a smaller one.
    "phi3small": {"dense_attention_every_n_layers": 1, "gegelu_limit": 20.0, "vocab_size": 100352},
    "phixtral": {"num_vocab": 512, "num_local_experts": 4, "rotary_dim": 16},
    "plamo": {"n_shared_head": 2},
    "qwen": {"kv_channels": 32, "intermediate_size": 768},
    "recurrent_gemma": {
        "logits_soft_cap": 30.0,
        "attention_window_size": 64,
        "block_types": ["recurrent", "attention"],
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
    },
    "rwkv7": {
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 16,
        "head_dim": 32,
    },
    "spark2_5": {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "stablelm": {"partial_rotary_factor": 0.25},
    "step3p5": {"num_attention_groups": 2},
    "cohere2": {"num_hidden_layers": 4},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1, 1], "layer_types": None, "rotary_dim": 16},
    "kimi_k3": {
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "full_attn_layers": [3],
            "num_heads": 4,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "num_key_value_heads": 4,
    },
}
#: Architectures that hold the language model of another, whose settings theirs are.
_AROUND = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_k3": "kimi_k3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "llama4": "llama4",
    "minimax_m3_vl": "minimax_m3_vl",
    "mistral3": "llama",
    "muse_spark": "muse_spark",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_5": "qwen3_next",
    "qwen3_5_moe": "qwen3_next",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
#: Architectures that no toy is made of, and why.
NOT_TRIED = {
    "bitnet": "needs an Apple GPU",
    "muse_spark": "needs an Apple GPU",
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "is made from packed weights alone",
}
_TIED = "tie_word_embeddings"
_INTRODUCTION = """\
<!-- Made by `python docs/make_architectures_page.py` from toy models: change tests/architectures.py, not this page. -->

# Architectures

The [loss without logits](../guides/fine-tune.md#never-hold-the-logits) needs a model split into its output layer and
what comes before. It is found by looking, not by name, so that models which are not listed here are split too;
`lm.train` and all searches say how it went with yours. This is how it goes with every architecture that the installed
mlx-lm has, at toy sizes, with the table of tokens used again for logits (tied) and with a layer of its own.

| mlx-lm's module | split | output layer | logits then have a | why not |
| --- | --- | --- | --- | --- |
"""
#: Toy models stay below this.
_MOST_BYTES = 64 << 20


def names() -> list[str]:
    """The modules of mlx-lm that hold a `Model`, read from their source: importing some ends the process."""
    found = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        text = (Path(mlx_lm.models.__path__[0]) / f"{module.name}.py").read_text(encoding="utf-8")
        bodies = ast.parse(text).body
        if any(isinstance(node, ast.ClassDef) and node.name == "Model" for node in bodies) or "import Model" in text:
            found.append(module.name)
    return found


def toy(name: str, *, tied: bool = True) -> nn.Module:
    """One architecture at a toy size, with its table of tokens used again for logits where it knows how."""
    inner, word = _AROUND.get(name), {} if "tie_word_embeddings" in _OTHERS.get(name, {}) else {_TIED: tied}
    text = {} if inner is None else {"text_config": configuration(inner, **_own(inner) | word)}
    model = language_model(name, **_own(name) | word | text)
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    if size > _MOST_BYTES:
        raise ValueError(f"no toy: {size:,} bytes")
    return model


def _own(name: str) -> dict[str, Any]:
    return {} if name in FAMILIES or name in EXPERTS else _SIZES | _OTHERS.get(name, {})


def splits(name: str) -> list[SplitHead | str]:
    """The splits of an architecture, tied and not, or the reasons why there are none."""
    mx.random.seed(0)
    found = dict.fromkeys(split_head(toy(name, tied=tied)) for tied in (True, False))
    # mlx-lm cannot call some of them tied.
    return [one for one in found if not str(one).startswith("it cannot be called")] or list(found)


def page() -> str:
    """The page of the documentation, in Markdown."""
    rows = []
    for name in names():
        found = [] if name in NOT_TRIED else splits(name)
        heads = [one for one in found if isinstance(one, SplitHead)]
        reasons = [one for one in found if isinstance(one, str)]
        shapes = [word for word in ("scale", "softcap") if any(getattr(head, word) is not None for head in heads)]
        layers = ", ".join(f"`{path}`" for path in dict.fromkeys(head.path for head in heads))
        answer = "not tried" if name in NOT_TRIED else "yes" if not reasons else "tied: no" if heads else "no"
        why = NOT_TRIED.get(name, "; ".join(reasons))
        rows.append(f"| `{name}` | {answer} | {layers} | {', '.join(shapes)} | {why} |")
    return _INTRODUCTION + "\n".join(rows) + "\n"
