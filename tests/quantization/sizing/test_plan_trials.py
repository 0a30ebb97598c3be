import mlx.core as mx
import mlx.nn as nn
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.quantization.sizing import plan_trials


def quiet(model: nn.Module, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, 4, 64, progress=False, **{"method": "nearest", **kwargs})


def calibration(count: int = 4) -> list[mx.array]:
    return [toys.tokens(2, 17, seed=i) for i in range(count)]


def test_a_mixed_choice_that_is_worse_is_rejected(monkeypatch) -> None:
    seen = []

    def trial(plan, *_):
        seen.append(plan)
        return float(-len(seen))  # the second, one format for all, comes out lower

    monkeypatch.setattr(plan_trials, "_trial", trial)
    report = quiet(toys.llama(tied=False), target_bpw=4.6, calibration=calibration())
    assert len({(x.bits, x.group_size) for x in report.layers}) == 1
    assert "rejected" in " ".join(report.notes)
    assert report.bits_per_weight <= 4.6
