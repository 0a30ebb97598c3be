"""Training steps to measure with: architectures, kinds of training, optimizers, checkpointed and compiled or not.

Each entry of `WORKLOADS` builds one `Workload`. Its parameters and optimizer state are evaluated, and nothing
of the step is. `python tests/benchmarks/workloads.py [name ...]` runs a step of each, with its time and peak.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map
from workload_models import (
    EXPERTS,
    VOCABULARY,
    ConvNet,
    Perceptron,
    Recurrent,
    Translator,
    language_model,
    squared_relu,
)


@dataclass(frozen=True)
class Workload:
    """One training step and what it needs.

    `step(batch)` runs it lazily and returns the loss first; `make_batch(n)` returns the longest batch of n.
    """

    name: str
    model: nn.Module
    optimizer: optim.Optimizer
    step: Callable[[Any], mx.array]
    make_batch: Callable[[int], Any]
    batch_size: int
    checkpointed: bool = False
    compiled: bool = False

    @property
    def state(self) -> tuple[nn.Module, optim.Optimizer]:
        """What the step changes: the model and the optimizer."""
        return self.model, self.optimizer


def tokens(n: int, length: int = 97) -> mx.array:
    """A batch of n token rows, [n, length]."""
    return (mx.arange(n * length) * 7919 % VOCABULARY).reshape(n, length)


def token_loss(model: nn.Module, batch: mx.array) -> mx.array:
    """Mean cross entropy of the next token, computed in float32 as mlx-lm's trainer does."""
    logits = model(batch[:, :-1])
    return nn.losses.cross_entropy(logits.astype(mx.float32), batch[:, 1:], reduction="mean")


def labelled(shape: tuple[int, ...], n: int) -> tuple[mx.array, mx.array]:
    """n inputs of `shape` and their class labels, [n, *shape] and [n]."""
    size = n
    for d in shape:
        size *= d
    return mx.sin(mx.arange(size, dtype=mx.float32)).reshape(n, *shape), mx.arange(n) % 10


def class_loss(model: nn.Module, batch: tuple[mx.array, mx.array]) -> mx.array:
    """Mean cross entropy of class labels."""
    x, labels = batch
    return nn.losses.cross_entropy(model(x), labels, reduction="mean")


def translation_loss(model: nn.Module, batch: mx.array) -> mx.array:
    """Mean cross entropy of the target's next token, the source being the same tokens."""
    logits = model(batch[:, :-1], batch[:, :-1])
    return nn.losses.cross_entropy(logits, batch[:, 1:], reduction="mean")


OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "sgd": lambda: optim.SGD(1e-3),
    "momentum": lambda: optim.SGD(1e-3, momentum=0.9),
    "adamw": lambda: optim.AdamW(1e-4),
    "adafactor": lambda: optim.Adafactor(1e-4, relative_step=False, scale_parameter=False),
    "muon": lambda: optim.MultiOptimizer(
        [optim.Muon(1e-3), optim.AdamW(1e-4)], [lambda name, weight: weight.ndim == 2 and "embed" not in name]
    ),
}


def build(
    name: str,
    make_model: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Any], mx.array],
    make_batch: Callable[[int], Any],
    *,
    batch_size: int = 4,
    optimizer: str = "sgd",
    dtype: mx.Dtype = mx.float32,
    tuning: str = "full",
    checkpoint: str = "",
    compiled: bool = False,
) -> Workload:
    """Put a model, a loss and an optimizer together as one training step.

    `tuning` is "full", "lora" or "qlora"; `checkpoint` is "" (none), "blocks" (every block by `mlx_tune.checkpoint`)
    or "bare" (every block by `mx.checkpoint`).
    """
    mx.random.seed(0)
    model = make_model()
    if dtype != mx.float32:
        model.set_dtype(dtype)
    if tuning != "full":
        _adapt(model, quantized=tuning == "qlora")
    if checkpoint == "blocks":
        import mlx_tune

        for layer in model.layers:
            mlx_tune.checkpoint(layer)
    elif checkpoint == "bare":
        _checkpoint_bare(model.layers)
    model.train()
    chosen = OPTIMIZERS[optimizer]()
    chosen.init(model.trainable_parameters())
    mx.eval(model.parameters(), chosen.state)
    value_and_grad = nn.value_and_grad(model, loss)

    def step(batch: Any) -> mx.array:
        value, gradients = value_and_grad(model, batch)
        chosen.update(model, gradients)
        return value

    if compiled:
        state = [model.state, chosen.state, mx.random.state]
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    return Workload(name, model, chosen, step, make_batch, batch_size, bool(checkpoint), compiled)


def _adapt(model: nn.Module, *, quantized: bool) -> None:
    """Freeze `model`, quantize it where asked, and give every block LoRA adapters of rank 8."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    if quantized:
        nn.quantize(model, 64, 4)
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 10.0, "dropout": 0.0})


def _checkpoint_bare(layers: list[nn.Module]) -> None:
    """Checkpoint blocks with `mx.checkpoint` alone, through a subclass so that other instances stay as they are."""
    for layer in layers:
        original = type(layer).__call__

        def call(self: nn.Module, *args: Any, _original: Any = original, **named: Any) -> Any:
            def pure(parameters: Any, *inner: Any, **inner_named: Any) -> Any:
                self.update(parameters)
                return _original(self, *inner, **inner_named)

            return mx.checkpoint(pure)(self.trainable_parameters(), *args, **named)

        layer.__class__ = type(type(layer).__name__, (type(layer),), {"__call__": call})


def _text(family: str, **options: Any) -> Callable[[str], Workload]:
    sizes = options.pop("sizes", {})
    length = options.pop("length", 97)
    return lambda name: build(
        name, lambda: language_model(family, **sizes), token_loss, partial(tokens, length=length), **options
    )


def _classify(make_model: Callable[[], nn.Module], shape: tuple[int, ...], **options: Any) -> Callable[[str], Workload]:
    return lambda name: build(name, make_model, class_loss, partial(labelled, shape), **options)


def _distilled(name: str) -> Workload:
    """A student that learns what a teacher says, whose activations are compiled since they lie outside the gradient."""
    mx.random.seed(1)
    teacher = Perceptron(1024)
    mx.eval(teacher.parameters())
    plain = build(name, Perceptron, class_loss, partial(labelled, (256,)), batch_size=512, optimizer="adamw")
    value_and_grad = nn.value_and_grad(plain.model, lambda model, x, taught: mx.square(model(x) - taught).mean())

    def step(batch: tuple[mx.array, mx.array]) -> mx.array:
        value, gradients = value_and_grad(plain.model, batch[0], teacher(batch[0]))
        plain.optimizer.update(plain.model, gradients)
        return value

    return replace(plain, step=step)


_MANY_EXPERTS = {**dict.fromkeys(("num_experts", "n_routed_experts"), 64), "num_experts_per_tok": 4}

_BUILDERS: dict[str, Callable[[str], Workload]] = {
    "llama-f32-sgd": _text("llama"),
    "llama-f32-adamw": _text("llama", optimizer="adamw"),
    "llama-f32-adamw-compiled": _text("llama", optimizer="adamw", compiled=True),
    "llama-bf16-sgd": _text("llama", dtype=mx.bfloat16),
    "llama-bf16-adamw-compiled": _text("llama", dtype=mx.bfloat16, optimizer="adamw", compiled=True),
    "llama-f32-adafactor": _text("llama", optimizer="adafactor"),
    "llama-f32-muon": _text("llama", optimizer="muon"),
    "llama-f32-sgd-checkpointed": _text("llama", checkpoint="blocks"),
    "llama-f32-sgd-checkpointed-compiled": _text("llama", checkpoint="blocks", compiled=True),
    "llama-bf16-adamw-checkpointed": _text("llama", checkpoint="blocks", dtype=mx.bfloat16, optimizer="adamw"),
    "llama-f32-sgd-bare-checkpoint": _text("llama", checkpoint="bare"),
    "llama-f32-lora-adamw": _text("llama", tuning="lora", optimizer="adamw"),
    "llama-bf16-lora-adamw-compiled": _text(
        "llama", tuning="lora", optimizer="adamw", dtype=mx.bfloat16, compiled=True
    ),
    "llama-qlora-adamw": _text("llama", tuning="qlora", optimizer="adamw", batch_size=2, length=65),
    "llama-qlora-adamw-compiled": _text(
        "llama", tuning="qlora", optimizer="adamw", batch_size=2, length=65, compiled=True
    ),
    "llama-lora-adamw-checkpointed": _text("llama", tuning="lora", optimizer="adamw", checkpoint="blocks"),
    "qwen3-f32-adamw": _text("qwen3", optimizer="adamw"),
    "qwen3-bf16-sgd-compiled": _text("qwen3", dtype=mx.bfloat16, compiled=True),
    "qwen3-f32-sgd-checkpointed": _text("qwen3", checkpoint="blocks"),
    "gemma2-f32-sgd": _text("gemma2"),
    "gemma3-bf16-adafactor": _text("gemma3_text", dtype=mx.bfloat16, optimizer="adafactor"),
    "gemma3-f32-adamw-checkpointed": _text("gemma3_text", optimizer="adamw", checkpoint="blocks"),
    "moe-f32-sgd": _text("qwen3_moe"),
    "moe-f32-adamw-compiled": _text("qwen3_moe", optimizer="adamw", compiled=True),
    **{f"{family}-f32-adamw": _text(family, optimizer="adamw") for family in EXPERTS},
    **{f"{family}-64-experts-f32-sgd": _text(family, sizes=_MANY_EXPERTS) for family in ("glm4_moe_lite", "laguna")},
    "laguna-f32-adamw-compiled": _text("laguna", optimizer="adamw", compiled=True),
    "lfm2-f32-sgd": _text("lfm2"),
    "hybrid-f32-sgd": _text("falcon_h1"),
    "hybrid-f32-adamw-compiled": _text("falcon_h1", optimizer="adamw", compiled=True),
    "mamba2-f32-sgd": _text("mamba2"),
    "cnn-f32-sgd": _classify(ConvNet, (32, 32, 3), batch_size=16, optimizer="momentum"),
    "cnn-f32-adamw-compiled": _classify(ConvNet, (32, 32, 3), batch_size=16, optimizer="adamw", compiled=True),
    "gru-f32-adamw": _classify(lambda: Recurrent(nn.GRU), (64, 48), batch_size=32, optimizer="adamw"),
    "lstm-f32-sgd-compiled": _classify(lambda: Recurrent(nn.LSTM), (64, 48), batch_size=32, compiled=True),
    "transformer-f32-adamw": lambda name: build(
        name, Translator, translation_loss, tokens, batch_size=8, optimizer="adamw"
    ),
    "transformer-dropout-f32-sgd": lambda name: build(
        name, lambda: Translator(dropout=0.1), translation_loss, tokens, batch_size=8
    ),
    "mlp-f32-adamw": _classify(Perceptron, (256,), batch_size=512, optimizer="adamw"),
    "mlp-f32-sgd-compiled": _classify(Perceptron, (256,), batch_size=512, compiled=True),
    "mlp-custom-gradient-f32-adamw": _classify(
        lambda: Perceptron(activation=squared_relu), (256,), batch_size=512, optimizer="adamw"
    ),
    "mlp-distilled-f32-adamw": _distilled,
    "mlp-dropout-f32-sgd-compiled": _classify(lambda: Perceptron(dropout=0.2), (256,), batch_size=512, compiled=True),
}

WORKLOADS: dict[str, Callable[[], Workload]] = {name: partial(builder, name) for name, builder in _BUILDERS.items()}


def evaluate(workload: Workload, batch: Any) -> float:
    """Run one real step and return its loss."""
    loss = workload.step(batch)
    mx.eval(loss, workload.model.parameters(), workload.optimizer.state)
    return float(loss.item())


def main(names: list[str]) -> None:
    """Run two steps of each named workload, or of all, and print time and peak of the second."""
    for name in names or list(WORKLOADS):
        workload = WORKLOADS[name]()
        batch = tree_map(mx.array, workload.make_batch(workload.batch_size))
        mx.eval(batch)
        first = evaluate(workload, batch)
        mx.reset_peak_memory()
        started = time.perf_counter()
        second = evaluate(workload, batch)
        seconds = time.perf_counter() - started
        print(f"{name:38} {seconds:7.3f} s {mx.get_peak_memory() / 1e6:8.1f} MB  loss {first:.3f} {second:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
