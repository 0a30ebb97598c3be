"""Real-size language models with random weights, and their compiled training steps, for the figures on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_tune as mt
from mlx_tune.losses.splitting import split_head

#: name: (width, blocks, feed-forward width, heads, key-value heads, vocabulary, tied)
SIZES = {
    "tiny": (256, 4, 512, 8, 4, 1024, True),
    "1B": (2048, 16, 8192, 32, 8, 32000, True),
    "8B": (4096, 32, 14336, 32, 8, 128256, False),
}


@dataclass
class Training:
    """A model in training."""

    model: nn.Module
    optimizer: optim.Optimizer
    step: Any
    length: int
    vocabulary: int

    @property
    def state(self) -> tuple[Any, Any]:
        """What the step changes."""
        return self.model, self.optimizer

    def make_batch(self, n: int) -> mx.array:
        """Tokens `[n, length]`."""
        return mx.random.randint(0, self.vocabulary, (n, self.length), key=mx.random.key(n))


def build(size: str, *, seed: int = 0) -> nn.Module:
    """An mlx-lm Llama in bfloat16."""
    width, blocks, inner, heads, kv_heads, vocabulary, tied = SIZES[size]
    mx.random.seed(seed)
    model = llama.Model(
        llama.ModelArgs.from_dict(
            {
                "model_type": "llama",
                "hidden_size": width,
                "num_hidden_layers": blocks,
                "intermediate_size": inner,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "rms_norm_eps": 1e-5,
                "vocab_size": vocabulary,
                "tie_word_embeddings": tied,
            }
        )
    )
    model.set_dtype(mx.bfloat16)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one by one: the float32 values that they are cast from are freed in between
    return model


def parameters(model: nn.Module) -> int:
    """How many numbers the model has."""
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def training(
    size: str,
    *,
    length: int = 1025,
    lora: bool = False,
    bits: int | None = None,
    optimizer: str = "sgd",
    linear_loss: bool = False,
) -> Training:
    """A model and its compiled step.

    Args:
        size: A key of `SIZES`.
        length: Tokens in a row; one fewer are predicted.
        lora: Train adapters of rank 8 with dropout instead of everything.
        bits: Quantize the base.
        optimizer: "sgd" or "adamw".
        linear_loss: Take the loss from hidden states and the head, without the logits.
    """
    model = build(size)
    if bits is not None:
        nn.quantize(model, group_size=64, bits=bits)
        mx.eval(model.parameters())
    if lora:
        model.freeze()
        linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 20.0, "dropout": 0.05})
    mx.eval(model.parameters())
    model.train()
    made = optim.SGD(1e-3) if optimizer == "sgd" else optim.AdamW(1e-5)
    made.init(model.trainable_parameters())
    mx.eval(made.state)
    state = [model.state, made.state, mx.random.state]

    split = split_head(model) if linear_loss else None

    def loss_of(model: nn.Module, tokens: mx.array) -> mx.array:
        if split is not None:
            return mt.linear_cross_entropy(split.states(model, tokens[:, :-1]), split.layer, tokens[:, 1:])
        logits = model(tokens[:, :-1])
        return nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:], reduction="mean")

    loss_and_gradients = nn.value_and_grad(model, loss_of)

    def plain(tokens: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(model, tokens)
        made.update(model, gradients)
        return loss

    step = partial(mx.compile, inputs=state, outputs=state)(plain)
    return Training(model, made, step, length, SIZES[size][5])
