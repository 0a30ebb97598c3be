"""mlx-lm's loss, a few tokens' logits at a time."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.losses.linear_cross_entropy import linear_cross_entropy
from mlx_tune.losses.splitting import SplitHead, split_head

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

Loss = Callable[..., tuple["mx.array", "mx.array"]]

#: For each model, by identity: itself, what it looked like when it was split, and the answer.
_known: dict[int, tuple[weakref.ref[nn.Module], object, SplitHead | str]] = {}


@dataclass(frozen=True)
class ChosenLoss:
    """The loss that a run trains on.

    Attributes:
        function: As mlx-lm's trainer takes it.
        text: Its name, and where it is the plain one why.
        linear: True where no more than some tokens' logits are held.
    """

    function: Loss
    text: str
    linear: bool = False


def loss(model: nn.Module, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
    """The loss that mlx-lm trains on, for training loops of your own, without ever holding all logits.

    Value and gradients are those of `mlx_lm.tuner.trainer.default_loss`; in half precision they are nearer to those in
    float32, since the loss of each token is taken in float32. The model is split the first time, and again where its
    layers have changed; a warning says why where it cannot be split, and the plain loss is what is returned.

    Args:
        model: A model of mlx-lm's, or any other that makes logits `[rows, length, vocabulary]` of tokens alone.
        batch: Tokens `[rows, length]`.
        lengths: `[rows, 2]`, where the loss of each row begins and ends.

    Returns:
        The mean loss in nats a token, and the number of tokens that it is the mean of.

    Examples:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 100))
        >>> batch, lengths = mx.random.randint(0, 100, (2, 9)), mx.array([[1, 8], [1, 4]])
        >>> (value, tokens), gradients = nn.value_and_grad(model, loss)(model, batch, lengths)
        >>> tokens.item()
        12
    """
    split = _split(model)
    if isinstance(split, str):
        return _plain()(model, batch, lengths)
    return _linear_loss(split, model, batch, lengths)


def choose_loss(model: nn.Module, given: Loss | None = None, *, plain: bool = False, fit: object = None) -> ChosenLoss:
    """The loss that a model is trained on: one that was given, the linear one where it is exact, else mlx-lm's.

    Args:
        model: The model as it is to be trained.
        given: A loss of the caller's own.
        plain: True for mlx-lm's own in any case.
        fit: The result of a search, which may have chosen mlx-lm's own.

    Raises:
        InvalidArgumentError: A loss of the caller's own together with `plain`.
    """
    if given is not None:
        if plain:
            raise InvalidArgumentError("plain_loss=True and loss= both say which loss to train on: pass one of them.")
        return ChosenLoss(given, "the loss that was given")
    if plain:
        return ChosenLoss(_plain(), "plain, as asked for: all logits are held")
    if getattr(fit, "loss", "") == "plain":
        return ChosenLoss(_plain(), "plain, as the search chose for its speed: all logits are held")
    split = split_head(model)
    if isinstance(split, str):
        return ChosenLoss(_plain(), f"plain, which holds all logits: {split}")
    shape = [] if split.scale is None else [f"scaled by {split.scale:.6g}"]
    shape += [] if split.softcap is None else [f"capped at {split.softcap:.6g}"]
    shaped = f", {' and '.join(shape)}" if shape else ""

    def linear(model: nn.Module, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        return _linear_loss(split, model, batch, lengths)

    return ChosenLoss(linear, f"linear: logits of {split.path} a few tokens at a time{shaped}", linear=True)


def _linear_loss(split: SplitHead, model: nn.Module, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
    import mlx.core as mx

    tokens, targets = batch[:, :-1], batch[:, 1:]
    places = mx.arange(1, batch.shape[1])
    counted = (places >= lengths[:, :1]) & (places <= lengths[:, 1:])
    total = linear_cross_entropy(
        split.states(model, tokens),
        split.layer,
        targets,
        weights=counted,
        scale=split.scale,
        softcap=split.softcap,
        reduction="sum",
    )
    number = counted.sum()
    return total / number, number


def _plain() -> Loss:
    from mlx_lm.tuner.trainer import default_loss

    return cast(Loss, default_loss)


def _split(model: nn.Module) -> SplitHead | str:
    """The split of a model, found once for as long as its layers are the same."""
    looks = tuple((id(module), type(module)) for module in model.modules())
    known = _known.get(id(model))
    if known is not None and known[0]() is model and known[1] == looks:
        return known[2]
    split = split_head(model)
    key = id(model)
    _known[key] = weakref.ref(model, lambda gone: _forget(key, gone)), looks, split
    if isinstance(split, str):
        warnings.warn(f"lm.loss is mlx-lm's own here, which holds all logits: {split}.", stacklevel=3)
    return split


def _forget(key: int, gone: weakref.ref[nn.Module]) -> None:
    if key in _known and _known[key][0] is gone:
        del _known[key]
