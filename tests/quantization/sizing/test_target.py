import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.errors import InvalidArgumentError, QuantizationError
from mlx_tune.quantization.sizing.sensitivity import weight_errors


def quiet(model: nn.Module, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, 4, 64, progress=False, **{"method": "nearest", **kwargs})


def planned(model: nn.Module, **kwargs) -> mt.QuantizationPlan:
    return mt.plan_quantization(model, 4, 64, **{"method": "nearest", **kwargs})


def calibration(count: int = 4) -> list[mx.array]:
    return [toys.tokens(2, 17, seed=i) for i in range(count)]


@pytest.mark.parametrize(
    ("bpw", "method"), [(2.7, "nearest"), (3.5, "optimal"), (4.5, "nearest"), (7.0, "nearest"), (12.0, "nearest")]
)
def test_never_over_the_target_and_close_below_it(bpw: float, method: str) -> None:
    model = toys.llama(tied=False)
    plan = planned(model, method=method, target_bpw=bpw)
    assert 0.9 * bpw < plan.bits_per_weight <= bpw
    assert type(model.lm_head) is nn.Linear
    report = quiet(model, method=method, target_bpw=bpw)
    assert report.bits_per_weight == plan.bits_per_weight
    assert report.size_after_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())


def test_bytes_and_bits_mean_the_same() -> None:
    model = toys.llama()
    by_bits = planned(model, target_bpw=4.0)
    by_bytes = planned(model, target_bytes=int(4.0 * by_bits.parameters / 8))
    assert by_bits.to_dict() == by_bytes.to_dict()
    assert planned(model, target_bytes="158kB").size_after_bytes <= 158_000


def test_more_room_is_never_worse() -> None:
    model = toys.llama()
    costs = []
    for bpw in (2.7, 4.2, 16.0):
        plan = planned(model, target_bpw=bpw)
        costs.append(sum(weight_errors(x, [x.format], "nearest")[x.format] for x in plan.layers))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0  # 16 bits: everything is left alone


def test_what_cannot_be_met_says_what_could() -> None:
    with pytest.raises(QuantizationError, match=r"cannot be met: with every layer at its smallest the model takes"):
        planned(toys.llama(), target_bpw=1.0)
    with pytest.raises(QuantizationError, match=r"cannot be met"):
        planned(toys.llama(tied=False), target_bpw=4.0, skip="*.mlp.*")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"target_bpw": 4.5, "target_bytes": 100}, QuantizationError, "give one of them"),
        ({"target_bpw": -1}, QuantizationError, "target_bpw=-1 must be a number of bits per weight"),
        ({"target_bpw": "4.5"}, QuantizationError, "target_bpw='4.5' must be"),
        ({"target_bytes": "lots"}, InvalidArgumentError, "'lots' is not a number of bytes"),
    ],
)
def test_targets_that_cannot_be_meant(arguments: dict, error: type[Exception], text: str) -> None:
    model = toys.llama()
    with pytest.raises(error, match=text):
        quiet(model, **arguments)
    assert type(model.model.embed_tokens) is nn.Embedding


def test_with_calibration_sensitivity_is_measured_and_the_choice_checked() -> None:
    model = toys.llama(tied=False)
    before = toys.arrays_of(model)
    plan = planned(model, target_bpw=3.6, calibration=calibration())
    assert toys.same_arrays(before, toys.arrays_of(model))
    assert type(model.lm_head) is nn.Linear
    text = " ".join(plan.notes)
    assert "measured on 68 tokens of the calibration" in text
    assert "Checked: divergence" in text or "rejected" in text
    assert plan.bits_per_weight <= 3.6


def test_without_calibration_the_evaluation_judges() -> None:
    report = quiet(toys.llama(), target_bpw=3.6, evaluation=calibration(1))
    assert "of the evaluation, as there is no calibration" in " ".join(report.notes)
    report = quiet(toys.llama(), target_bpw=3.6)
    assert "Not checked against" in " ".join(report.notes)


def test_models_without_logits() -> None:
    batches = [mx.random.normal((2, 8, 8, 3), key=mx.random.key(i)) for i in range(2)]
    report = quiet(toys.vision(), target_bpw=18.5, calibration=batches, evaluation=batches)
    assert report.bits_per_weight <= 18.5
    assert next(x for x in report.layers if x.path == "narrow").group_size == 32  # up for choice, though 64 is not
    assert "measured on 1 batches" in " ".join(report.notes)


def test_layers_that_matter_more_get_more_bits() -> None:
    class Unequal(nn.Module):
        """Half of the output hardly depends on one layer and wholly on the other."""

        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(128, 64, bias=False), nn.Linear(128, 64, bias=False)

        def __call__(self, x: mx.array) -> mx.array:
            return 10 * self.loud(x) + 0.1 * self.quiet(x)

    mx.random.seed(0)
    model = Unequal()
    batches = [mx.random.normal((16, 128), key=mx.random.key(i)) for i in range(2)]
    plan = planned(model, target_bpw=5.5, calibration=batches)
    bits = {layer.path: layer.bits for layer in plan.layers}
    assert bits["loud"] > bits["quiet"]


def test_notes_are_those_of_the_choice_and_not_of_the_plan_before_it() -> None:
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 64))
    before = mt.plan_quantization(model, 4, 64)
    assert "Left as they are: 1 (last axis 96" in before.notes[0]
    mixed = mt.plan_quantization(model, 4, 64, target_bpw=6.5, method="nearest")
    assert not mixed.skipped
    assert not any("Left as they are" in note for note in mixed.notes)
    assert any(note.startswith("Mixed formats") for note in mixed.notes)
