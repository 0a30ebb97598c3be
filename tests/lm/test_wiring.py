from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from metal_stand_in import MetalStandIn
from mlx.utils import tree_flatten
from mlx_lm.tuner.callbacks import TrainingCallback

import mlx_tune as mt
from mlx_tune import lm


def weights(model) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in tree_flatten(model.parameters())}


pytestmark = pytest.mark.usefixtures("adapters_exist")


def test_the_wired_limit_that_mlx_lm_leaves_behind_is_put_back(toy, rows, arguments, metal: MetalStandIn) -> None:
    model, during = toy(lora=True), []

    class Watch(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            during.append(metal.limit)

    metal.limit = 7 << 30
    lm.train(model, optim.SGD(1e-2), rows, None, arguments(), training_callback=Watch())
    assert metal.recommended_bytes in metal.limits  # mlx-lm does raise it to all of the working set
    assert set(during) == {7 << 30}  # the model is far smaller than what was wired already
    assert metal.limit == 7 << 30


@pytest.mark.parametrize("how", ["turned off", "tight"])
def test_where_nothing_is_to_be_wired_mlx_lm_does_not_wire_either(
    toy, rows, arguments, metal: MetalStandIn, monkeypatch, how: str
) -> None:
    model, during = toy(lora=True), []

    class Watch(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            during.append(metal.limit)

    limit = "3GB"
    if how == "turned off":
        monkeypatch.setenv("MLX_TUNE_NO_WIRING", "1")
    else:
        limit = sum(value.nbytes for value in weights(model).values())
    with mt.memory_limit(limit):
        result = lm.train(model, optim.SGD(1e-2), rows, None, arguments(), training_callback=Watch())
    assert "not wired: " in result.wired
    assert ("memory limit" in result.wired) == (how == "tight")
    assert metal.recommended_bytes in metal.limits
    assert set(during) == {0}
    assert metal.limit == 0
