"""Calibration that several machines share: each works on its rows of every batch, and gradients are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map

from mlx_tune.measuring.ranks import Ranks
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.units import number


@dataclass(frozen=True)
class Share:
    """The share of a batch that one rank does.

    Attributes:
        batch: Its rows; None where it has none.
        weight: The weight of its mean in the mean over the batch; over all ranks they sum to 1.
        size: The weight of the batch beside other batches.
    """

    batch: Batch | None
    weight: float
    size: int


class Shares:
    """The ranks that train together.

    Args:
        group: An `mx.distributed` group; None for that of `mlx.launch`, where it started this process.
    """

    def __init__(self, group: Any = None) -> None:
        """Join."""
        ranks = Ranks(group)
        self._group, self.size, self.rank = ranks.group, ranks.size, ranks.rank

    def of(self, batch: Batch, *, divide: bool = True) -> Share:
        """This rank's share of a batch.

        Args:
            batch: The whole. Sequences of tokens are dealt out in turn; what else a model is called with cannot be
                divided, so that every rank works on all of it.
            divide: False has every rank work on all of it in any case, as a loss that is no mean over tokens needs it.
        """
        if batch.tokens is None:
            return Share(batch, 1 / self.size, 1)
        if self.size == 1 or not divide:
            return Share(batch, 1 / self.size, batch.tokens.size)
        own = batch.tokens[self.rank :: self.size]
        if own.shape[0] == 0:
            return Share(None, 0.0, batch.tokens.size)
        return Share(Batch((own,), own), own.size / batch.tokens.size, batch.tokens.size)

    def mean(self, share: Share, loss: mx.array, gradients: object) -> tuple[mx.array, Any]:
        """The whole batch's loss and gradients out of those of all shares."""
        if self.size == 1:
            return loss, gradients
        scale = share.weight * self.size
        averaged = average_gradients(tree_map(lambda g: g * scale, gradients), self._group)
        return self._sum(loss * share.weight), averaged

    def total(self, figure: float) -> float:
        """The sum of all ranks' figures, the same on all of them."""
        if self.size == 1:
            return figure
        return number(self._sum(mx.array(figure)))

    def _sum(self, value: mx.array) -> mx.array:
        summed: mx.array = mx.distributed.all_sum(value, group=self._group)
        return summed
