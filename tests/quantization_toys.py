"""Small models for these tests, random but repeatable.

No row of weights is a single group, of 64 in most models: MLX multiplies those wrong on some GPUs (docs/upstream.md),
where such layers stay unpacked.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train scales for a fifth of the usual steps and time a model once: hardly a test is about either."""
    monkeypatch.setattr("mlx_tune.quantization.learning.dwq._STEPS", 48)
    monkeypatch.setattr("mlx_tune.quantization.judging.timed_runs._SECONDS", 0.0)


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
}


def llama(*, tied: bool = True, dtype: mx.Dtype = mx.bfloat16, **changes: object) -> nn.Module:
    from mlx_lm.models import llama as family

    mx.random.seed(7)
    arguments = {**_LLAMA, "tie_word_embeddings": tied, **changes}
    model = family.Model(family.ModelArgs(**arguments))  # type: ignore[arg-type]
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def qwen3_moe() -> nn.Module:
    from mlx_lm.models import qwen3_moe as family

    mx.random.seed(7)
    arguments = {
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 128,
        "rms_norm_eps": 1e-5,
        "vocab_size": 96,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 128,
        "norm_topk_prob": True,
    }
    model = family.Model(family.ModelArgs(**arguments))  # type: ignore[arg-type]
    mx.eval(model.parameters())
    return model


def gemma2() -> nn.Module:
    from mlx_lm.models import gemma2 as family

    mx.random.seed(7)
    arguments = {
        "model_type": "gemma2",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": 96,
        "num_key_value_heads": 1,
    }
    model = family.Model(family.ModelArgs(**arguments))  # type: ignore[arg-type]
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def lfm2() -> nn.Module:
    """A hybrid: short convolutions in some layers, attention in others."""
    from mlx_lm.models import lfm2 as family

    mx.random.seed(7)
    arguments = {
        "model_type": "lfm2",
        "vocab_size": 96,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 128,
        "block_ff_dim": 256,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
        "rope_theta": 1e4,
    }
    model = family.Model(family.ModelArgs(**arguments))  # type: ignore[arg-type]
    mx.eval(model.parameters())
    return model


#: What an architecture needs beside the sizes of a toy.
FAMILIES: dict[str, dict[str, object]] = {
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "rope_scaling": None},
    "deepseek_v3": {
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 64,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
    "phi": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "mamba2": {
        "num_heads": 4,
        "intermediate_size": 256,
        "state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": (0.0, 100.0),
        "time_step_rank": "auto",
    },
}


def family(name: str) -> nn.Module:
    """Experts, biases, latent attention, state spaces: one small model of an architecture, in bfloat16."""
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(7)
    sizes = {**_LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": False}
    model: nn.Module = module.Model(module.ModelArgs.from_dict(sizes | {"model_type": name} | FAMILIES[name]))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


class Vision(nn.Module):
    """A convolution, an odd width, a bias and a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, stride=4)
        self.narrow = nn.Linear(96, 80)
        self.odd = nn.Linear(80, 128)
        self.wide = nn.Linear(128, 128, bias=False)
        self.head = nn.Linear(128, 5)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.patch(x).reshape(x.shape[0], -1)
        x = nn.relu(self.narrow(x))
        return self.head(nn.relu(self.wide(nn.relu(self.odd(x)))))


def vision() -> Vision:
    mx.random.seed(7)
    model = Vision()
    mx.eval(model.parameters())
    return model


def tokens(rows: int = 4, length: int = 17, vocabulary: int = 96, seed: int = 0) -> mx.array:
    return mx.random.randint(0, vocabulary, (rows, length), key=mx.random.key(seed))


def stored_by_mlx(weight: mx.array, group_size: int, bits: int) -> tuple[mx.array, mx.array, mx.array]:
    """What `mx.quantize` makes of a weight; at 1 bit that of the CPU, since CUDA has no kernel and gives garbage."""
    packed, scales, biases = mx.quantize(weight, group_size, bits, stream=mx.cpu if bits == 1 else None)
    return packed, scales, biases


def arrays_of(model: nn.Module) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(model.parameters()))


def same_arrays(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and mx.array_equal(a[k], b[k]).item() for k in a
    )
