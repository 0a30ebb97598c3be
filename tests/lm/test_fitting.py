from __future__ import annotations

import pytest
from mlx_lm.tuner import trainer

import mlx_tune as mt
from mlx_tune import lm

pytestmark = pytest.mark.usefixtures("adapters_exist")


def test_a_search_keeps_to_the_data_set(toy, rows, arguments) -> None:
    result = lm.autobatch(toy(lora=True), rows[:5], arguments(), valid_set=rows[:2], budget="2GB", progress=False)
    assert result.batch_size == 2
    assert result.next_size is None


def test_checkpoints_hold_during_a_search_that_asks_for_them(toy, rows, arguments) -> None:
    model, seen = toy(lora=True), set()

    def loss(model, batch, lengths):
        seen.add(mt.is_checkpointed(model.layers[0]))
        return trainer.default_loss(model, batch, lengths)

    lm.autobatch(model, rows, arguments(grad_checkpoint=True), loss=loss, max_batch=1, budget="1GB", progress=False)
    assert seen == {True}
    assert not mt.is_checkpointed(model.layers[0])
