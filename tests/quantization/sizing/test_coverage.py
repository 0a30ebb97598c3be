"""Layers and experts that calibration does not reach, or hardly."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.learning.moments import InputMoments, count_experts
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.sizing.coverage import Coverage, measure_coverage


def test_reach_is_what_layers_are_given() -> None:
    model = toys.qwen3_moe()
    layers = plan_quantization(model).layers
    found, _ = measure_coverage(
        WalkedModel(model), layers, read_batches([toys.tokens(2, 17), toys.tokens(1, 9)], "calibration")
    )
    tokens = 2 * 16 + 8
    assert found["model.embed_tokens"] == found["lm_head"] == Coverage(tokens)
    stack = found["model.layers.0.mlp.switch_mlp.up_proj"]
    assert stack.experts is not None
    assert stack.inputs == sum(stack.experts) == 2 * tokens  # two experts a token
    assert len(stack.experts) == 8


@pytest.mark.parametrize(
    ("reach", "expected"),
    [
        (Coverage(0), False), (Coverage(31), False), (Coverage(32), True), (Coverage(100, (50, 50, 0, 0)), False),
        (Coverage(100, (50, 40, 33, 1)), True), (Coverage(4, (1, 1, 1, 1)), False),
    ],
)  # fmt: skip
def test_enough_is_some_dozen_inputs_and_half_of_the_experts(reach: Coverage, expected: bool) -> None:
    assert reach.enough(most=1000) is expected


def test_of_few_inputs_altogether_few_are_enough() -> None:
    assert Coverage(4).enough(most=4)


def test_moments_count_each_experts_inputs() -> None:
    assert count_experts(mx.array([[0, 3], [3, 3]]), 4) == [1, 0, 0, 3]
    assert InputMoments({"a": nn.Linear(4, 4)}).experts_of("a") is None
