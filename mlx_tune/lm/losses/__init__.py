"""The loss of next tokens as mlx-lm trains on it, without the logits where a model can be split."""

from __future__ import annotations

from mlx_tune.lm.losses.next_token import ChosenLoss, Loss, choose_loss, loss

__all__ = ["ChosenLoss", "Loss", "choose_loss", "loss"]
