from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from self_timed import Says, believed

from mlx_tune.quantization.judging import timed_runs
from mlx_tune.quantization.judging.timed_runs import measure_after, measure_before
from mlx_tune.quantization.models.batches import Batch
from mlx_tune.quantization.models.sites import WalkedModel


def test_a_loss_is_timed_with_its_model() -> None:
    def loss(model: nn.Module, x: mx.array) -> float:
        return 100 * model(x)

    batch = Batch((mx.zeros((2, 5)),), None)
    first = measure_before(WalkedModel(Says(1.0)), batch, tokens_in=False, loss=loss, timer=believed)
    found = measure_after(WalkedModel(Says(2.0)), batch, first, loss=loss, timer=believed)
    assert (found.before.prefill_seconds, found.after.prefill_seconds) == (500.0, 1000.0)


def test_a_run_that_takes_long_is_not_repeated(monkeypatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(timed_runs.time, "perf_counter", lambda: next(clock))
    runs = []
    assert timed_runs.median_seconds(lambda: runs.append(1) or mx.zeros(1)) == 2
    assert len(runs) == 1
