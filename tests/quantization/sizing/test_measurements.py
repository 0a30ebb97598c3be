from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.sizing import measurements, target
from mlx_tune.quantization.sizing.measurements import Measurements
from mlx_tune.substitution import ModuleCall, intercepted


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "_kept", type(measurements._kept)())


def calibration(first: int = 0) -> list[mx.array]:
    return [toys.tokens(2, 17, seed=first + i) for i in range(4)]


def planned(model: nn.Module, bpw: float = 4.5, **kwargs) -> mt.QuantizationPlan:
    keywords = {"method": "nearest", "calibration": calibration(), **kwargs}
    return mt.plan_quantization(model, 4, 64, target_bpw=bpw, **keywords)


def passes(model: nn.Module, work: Callable[[], object]) -> int:
    """The calls of a model's output layer meanwhile."""
    calls = 0

    def count(call: ModuleCall) -> object:
        nonlocal calls
        calls += 1
        return call.run()

    head = model.lm_head
    with intercepted([head], count):
        work()
    return calls


def test_another_size_takes_no_more_passes_than_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toys.llama(tied=False)
    runs, plans = [], []
    for bpw in (4.5, 4.5, 4.1):
        runs.append(passes(model, lambda bpw=bpw: plans.append(planned(model, bpw))))
    # Besides the layers: what the model gives unchanged, and blocks' outputs for late starts.
    assert runs[0] - runs[1] >= len(plans[0].layers) + 2
    assert runs[1] == runs[2] < 10
    assert "for an earlier size" not in " ".join(plans[0].notes)
    assert all("for an earlier size" in " ".join(plan.notes) for plan in plans[1:])
    assert plans[0].layers == plans[1].layers
    assert plans[2].bits_per_weight <= 4.1
    # A fresh copy of the same weights is the same model.
    assert "for an earlier size" in " ".join(planned(toys.llama(tied=False)).notes)


def _one_weight(model: nn.Module) -> dict:
    model.model.layers[0].self_attn.q_proj.weight[3, 5] += 0.01
    return {}


def _a_norm(model: nn.Module) -> dict:
    model.model.norm.weight = model.model.norm.weight * 1.5
    return {}


def _a_number(model: nn.Module) -> dict:
    model.model.layers[0].input_layernorm.eps = 0.5
    return {}


@pytest.mark.parametrize(
    "change",
    [
        _one_weight,
        _a_norm,
        _a_number,
        lambda _: {"calibration": calibration(9)},
        lambda _: {"method": "optimal"},
        lambda _: {"scale_dtype": "float32"},
        lambda _: {"effort": "best", "method": "optimal"},
    ],
)
def test_any_change_has_everything_measured_anew(change: Callable) -> None:
    model = toys.llama(tied=False)
    planned(model)
    changed = planned(model, **change(model))
    assert "for an earlier size" not in " ".join(changed.notes)
    assert len(measurements._kept) == 2


def test_a_size_far_off_is_measured_at_its_own_width() -> None:
    model = toys.llama(tied=False)
    planned(model, 7.0)
    assert "for an earlier size" not in " ".join(planned(model, 3.0).notes)
    known = Measurements(divergences={("a", Format(4, 64)): (1.0, 2.0)})
    assert known.near("a", Format(5, 32)) == known.near("a", Format(3, 64)) == (1.0, 2.0)
    assert known.near("a", Format(6, 64)) is known.near("b", Format(4, 64)) is None
    assert known.near("a", Format(4, 32, "mxfp4")) is None


def test_few_models_are_kept_and_none_of_their_arrays() -> None:
    for i in range(measurements._MODELS + 2):
        planned(toys.llama(), calibration=calibration(10 * i))
    assert len(measurements._kept) == measurements._MODELS
    assert target.measurements_of is measurements.measurements_of
