"""A language model small enough to train in a demonstration: tokenizer, architecture and loss, from text alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_tune.presentation.plain import Json

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> TokenizerWrapper:
    """Train a byte-level BPE tokenizer and write it where mlx-lm looks for one.

    Args:
        texts: Documents to learn merges from.
        vocabulary: Tokens in all, 256 bytes and the end-of-text token among them.
        folder: Gets `tokenizer.json` and `tokenizer_config.json`.

    Returns:
        The tokenizer as mlx-lm wraps it.
    """
    from mlx_lm.utils import load_tokenizer
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    trained.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return load_tokenizer(folder)


def small_llama(vocabulary: int, *, width: int = 128, layers: int = 5) -> tuple[nn.Module, dict[str, Json]]:
    """Build mlx-lm's Llama at a size that two processor cores can train.

    Args:
        vocabulary: Tokens of the tokenizer.
        width: Hidden size; heads are 32 wide.
        layers: Transformer blocks.

    Returns:
        The model, with fresh weights, and the configuration that rebuilds it.
    """
    from mlx_lm.models import llama

    config: dict[str, Json] = {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return llama.Model(llama.ModelArgs.from_dict(config)), config


def next_token_loss(model: nn.Module, tokens: mx.array) -> mx.array:
    """Mean cross-entropy of every next token.

    Args:
        model: Called with tokens `[batch, length - 1]`.
        tokens: `[batch, length]`.

    Returns:
        A scalar, in nats.
    """
    import mlx.core as mx
    import mlx.nn as nn

    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


def perplexity(model: nn.Module, batches: Iterable[mx.array]) -> float:
    """The number of tokens that the model hesitates between, on average, over held-out batches.

    Args:
        model: A language model; its training flag is put back.
        batches: Tokens `[batch, length]`, all of one shape.

    Returns:
        exp of the mean cross-entropy.
    """
    import math

    training = model.training
    model.eval()
    try:
        losses = [float(next_token_loss(model, batch)) for batch in batches]
    finally:
        model.train(training)
    return math.exp(sum(losses) / len(losses))


def generate_text(model: nn.Module, tokenizer: object, prompt: str, max_tokens: int) -> str:
    """Continue a prompt greedily with mlx-lm's own generator."""
    import mlx_lm

    text: str = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=max_tokens, verbose=False)
    return text
