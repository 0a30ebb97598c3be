"""Making a model ready to be fine-tuned in mlx-lm's three ways, and the optimizer that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlx_tune.errors import InvalidArgumentError

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.optimizers import Optimizer

FINE_TUNE_TYPES = ("lora", "dora", "full")
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon", "sgd": "SGD", "adafactor": "Adafactor"}


def add_adapters(
    model: nn.Module,
    fine_tune_type: str = "lora",
    *,
    num_layers: int = 16,
    lora_parameters: Mapping[str, object] | None = None,
) -> nn.Module:
    """Freeze a model, and make its last blocks trainable as `mlx_lm.lora` does.

    Args:
        model: A language model of mlx-lm, quantized or not; changed in place.
        fine_tune_type: "lora", "dora", or "full", which trains every weight of the blocks. Codes of a quantized layer
            have no gradient: there "full" trains scales and biases, where mlx-lm's own fails in the first step.
        num_layers: The number of blocks, counted from the last; -1 for all.
        lora_parameters: mlx-lm's `lora_parameters`: rank, scale, dropout and, if not all layers are meant, keys.
            mlx-lm's defaults (8, 20 and 0) for what is not given.

    Returns:
        The model.

    Raises:
        InvalidArgumentError: Another type, or more blocks than the model has; nothing is changed.

    Examples:
        ```python
        lm.add_adapters(model, "lora", num_layers=8, lora_parameters={"rank": 16})
        ```
    """
    if fine_tune_type not in FINE_TUNE_TYPES:
        raise InvalidArgumentError(f"fine_tune_type={fine_tune_type!r}: it is one of {', '.join(FINE_TUNE_TYPES)}.")
    blocks = model.layers
    if num_layers > len(blocks):
        raise InvalidArgumentError(
            f"num_layers={num_layers}: the model has {len(blocks)} blocks. Ask for fewer, or for -1, which is all."
        )
    if num_layers == 0 or num_layers < -1:
        raise InvalidArgumentError(f"num_layers={num_layers}: give a number of blocks, or -1 for all of them.")
    model.freeze()
    if fine_tune_type == "full":
        for block in blocks[-max(num_layers, 0) :]:
            block.unfreeze()
            freeze_codes(block)
        return model
    from mlx_lm.tuner.utils import linear_to_lora_layers

    settings = {"rank": 8, "scale": 20.0, "dropout": 0.0, **(lora_parameters or {})}
    linear_to_lora_layers(model, num_layers, settings, use_dora=fine_tune_type == "dora")
    return model


def freeze_codes(model: nn.Module) -> None:
    """Freeze every parameter that is made of whole numbers: those of quantized layers."""
    import mlx.core as mx
    import mlx.nn as nn

    for _, module in model.named_modules():
        codes = [
            name
            for name, value in module.items()
            if isinstance(value, mx.array) and not mx.issubdtype(value.dtype, mx.inexact)
        ]
        if codes:
            nn.Module.freeze(module, recurse=False, keys=codes)


def integer_parameters(model: nn.Module) -> list[str]:
    """Paths of trainable parameters that have no gradient, because they are whole numbers."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(model.trainable_parameters())
    return [path for path, value in flat if not mx.issubdtype(value.dtype, mx.inexact)]


def make_optimizer(
    name: str = "adam",
    learning_rate: float | Callable[[mx.array], mx.array] = 1e-5,
    settings: Mapping[str, object] | None = None,
) -> Optimizer:
    """An optimizer by mlx-lm's name for it.

    Args:
        name: "adam", "adamw", "muon", "sgd" or "adafactor".
        learning_rate: A number, or a schedule of `mlx.optimizers`.
        settings: Further arguments.

    Raises:
        InvalidArgumentError: Another name, or settings that the optimizer does not have.
    """
    import mlx.optimizers

    if name.lower() not in OPTIMIZERS:
        raise InvalidArgumentError(f"optimizer={name!r}: it is one of {', '.join(OPTIMIZERS)}.")
    kind = getattr(mlx.optimizers, OPTIMIZERS[name.lower()])
    try:
        optimizer: Optimizer = kind(learning_rate=learning_rate, **(settings or {}))
    except TypeError as error:
        raise InvalidArgumentError(f"optimizer={name!r} cannot be made with {dict(settings or {})}: {error}.") from None
    return optimizer


@contextmanager
def awake_adapters(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Give small values to the adapters that begin at zero, and put the zeros back.

    While one factor of an adapter is zero, so is the gradient of the other, whatever the model does.

    Args:
        model: A model with adapters of mlx-lm's, LoRA or DoRA.

    Yields:
        The paths of the parameters that were given values; they do not depend on the random stream, nor move it.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    adapters = {path: array for path, array in parameters.items() if path.rpartition(".")[2].startswith("lora_")}
    zeros = {path: array for path, array in adapters.items() if not mx.any(array != 0).item()}
    small = [
        (path, (0.01 * mx.random.normal(array.shape, key=mx.random.key(i))).astype(array.dtype))
        for i, (path, array) in enumerate(zeros.items())
    ]
    model.load_weights(small, strict=False)
    try:
        yield tuple(zeros)
    finally:
        model.load_weights(list(zeros.items()), strict=False)
