import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.errors import QuantizationError


def formats(plan: mt.QuantizationPlan) -> dict[str, str]:
    return {layer.path: str(layer.format) for layer in plan.layers}


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_of_the_model_that_results(tied: bool) -> None:
    model = toys.llama(tied=tied)
    plan = mt.plan_quantization(model, 3, 32)
    assert plan.size_before_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    nn.quantize(model, 32, 3)
    after = sum(a.nbytes for a in toys.arrays_of(model).values())
    assert plan.size_after_bytes == after
    assert plan.size_after_bytes == plan.rest_bytes + sum(x.bytes_after for x in plan.layers)
    from mlx_lm.utils import compute_bits_per_weight

    assert plan.bits_per_weight == pytest.approx(compute_bits_per_weight(model))


def test_weights_shared_between_modules_count_once() -> None:
    model = nn.Sequential(nn.Embedding(96, 128), nn.Linear(128, 96, bias=False))
    model.layers[1].weight = model.layers[0].weight
    plan = mt.plan_quantization(model, 4, 64)
    assert [layer.paths for layer in plan.layers] == [("layers.0", "layers.1")]
    assert plan.size_before_bytes == 96 * 128 * 4
    assert plan.size_after_bytes == 96 * 128 // 2 + 96 * 2 * 8
    assert plan.parameters == 96 * 128
    assert "shared with layers.1" in str(plan)


def test_a_module_that_stands_in_two_places_counts_once() -> None:
    layer = nn.Linear(128, 128)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    plan = mt.plan_quantization(model, 4, 64)
    assert [x.paths for x in plan.layers] == [("layers.0", "layers.2")]
    assert plan.size_before_bytes == 128 * 128 * 4 + 128 * 4


@pytest.mark.parametrize(
    "options", [{"skip": "layers.1"}, {"skip": "layers.0"}, {"overrides": {"layers.0": {"bits": 8}}}]
)
def test_a_shared_weight_with_two_fates_counts_twice_afterwards(options: dict) -> None:
    model = nn.Sequential(nn.Embedding(96, 128), nn.Linear(128, 96, bias=False))
    model.layers[1].weight = model.layers[0].weight
    plan = mt.plan_quantization(model, 4, 64, **options)
    assert plan.size_before_bytes == 96 * 128 * 4
    mt.quantize_model(model, 4, 64, progress=False, **options)
    assert plan.size_after_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    assert "stored apart from layers.0, whose weights it shares now" in str(plan)


def test_arrays_in_a_modules_own_lists_are_counted() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(128, 64)
            self.tables = [mx.zeros((3, 4)), {"deep": mx.zeros(5)}]

    model = nn.Sequential(Loose())
    plan = mt.plan_quantization(model, 4, 64)
    assert plan.size_before_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())
    assert [(x.path, x.bytes_after) for x in plan.skipped] == [("layers.0", 4 * (12 + 5))]
    assert plan.parameters == 128 * 64 + 64 + 12 + 5


def test_what_does_not_fit_is_skipped_with_its_reason_and_its_cost() -> None:
    plan = mt.plan_quantization(toys.vision(), 4, 64)
    skipped = {layer.path: layer for layer in plan.skipped}
    assert skipped["patch"].reason == "Conv2d has no quantized form in MLX"
    assert skipped["narrow"].reason == "last axis 96 not divisible by 64; 32 would do"
    assert skipped["odd"].reason == (
        "last axis 80 not divisible by 64; no group size of mode 'affine' divides it; mode 'nvfp4', in groups of 16, "
        "would do"
    )
    weights = 80 * 128
    assert skipped["odd"].cost_bytes == weights * 4 - (weights // 2 + weights // 64 * 8)
    assert formats(plan) == {"wide": "4 bits, group 64", "head": "4 bits, group 64"}
    text = str(plan)
    assert "last axis 80 not divisible by 64" in text
    assert "costs 35.0 kB" in text or "costs" in text
    total = sum(x.bytes_after for x in (*plan.layers, *plan.skipped)) + plan.rest_bytes
    assert total == plan.size_after_bytes


def test_a_layer_named_by_hand_must_be_possible() -> None:
    with pytest.raises(QuantizationError, match=r"overrides\['odd'\]: odd cannot be quantized: last axis 80"):
        mt.plan_quantization(toys.vision(), 4, 64, overrides={"odd": {"bits": 8}})
    plan = mt.plan_quantization(toys.vision(), 4, 64, overrides={"*": {"bits": 8, "group_size": 32}})
    assert formats(plan)["narrow"] == "8 bits, group 32"
    assert "odd" not in formats(plan)
