from __future__ import annotations

from collections.abc import Callable

import mlx.nn as nn
import pytest
import quantization_toys as toys
from outlier_model import Outliers, divergence, tokens

import mlx_tune as mt
from mlx_tune.quantization import quantize as quantize_of
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.judging.evaluation import Watched
from mlx_tune.quantization.judging.nearest_guard import Guard
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel


def test_a_result_worse_than_nearest_says_so_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"method": "optimal", "skip": "embed", "evaluation": [tokens(5)], "progress": False}
    assert mt.quantize_model(Outliers(), 3, 64, **made).warning is None  # type: ignore[arg-type]
    monkeypatch.setattr(quantize_of, "with_energies", lambda model, plan, *_, **__: (plan, ()))
    report = mt.quantize_model(Outliers(), 3, 64, **made)  # type: ignore[arg-type]
    nearest = divergence(3, "nearest")
    assert f"divergence {report.accuracy.mean_kl:.4g} against {nearest:.4g} on 256 tokens" in report.warning  # type: ignore[union-attr, operator]
    assert str(report).startswith("Worse than method='nearest'")
    assert report.summary().startswith("Worse than method='nearest'")


@pytest.mark.parametrize("make", [toys.llama, toys.qwen3_moe, toys.gemma2, toys.lfm2])
def test_the_guard_measures_what_nearest_gives(make: Callable[[], nn.Module]) -> None:
    model = make()
    judge = read_batches([toys.tokens(4, 17)], "evaluation")
    before = toys.arrays_of(model)
    plan = plan_quantization(model, 3, 32)
    with Watched(WalkedModel(model), judge) as divergence:
        found = Guard(plan, divergence)
    assert toys.same_arrays(before, toys.arrays_of(model))
    report = mt.quantize_model(make(), 3, 32, method="nearest", evaluation=[toys.tokens(4, 17)], progress=False)
    assert found.nearest == pytest.approx(report.accuracy.mean_kl, rel=1e-3)  # type: ignore[union-attr]
