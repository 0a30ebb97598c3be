"""Rounded keys and values give what mlx-lm's own quantized cache gives."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models import cache as caches
from toy_models import CONFIGS, build_model

from mlx_tune.devices import backend
from mlx_tune.lm.quantizing.rounded_cache import Rounding, RoundingCaches

TOKENS = mx.random.randint(0, 320, (2, 20), key=mx.random.key(0))


@pytest.fixture(params=["tied", "qwen3"])
def model(request: pytest.FixtureRequest):
    """In float32, where packed and unpacked arithmetic are the same but for the order of sums."""
    config = CONFIGS["tied"] if request.param == "tied" else CONFIGS["tied"] | {"model_type": "qwen3"}
    made = build_model(config)
    made.set_dtype(mx.float32)
    return made


@pytest.mark.skipif(backend() == "cuda", reason="CUDA has no packed product of 32 inputs: ml-explore/mlx#2536")
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_model_answers_as_with_mlx_lms_quantized_cache(model, bits: int) -> None:
    ours = RoundingCaches(model, Rounding(bits, bits, 32, mx.float32))(TOKENS)
    theirs = [cache.to_quantized(32, bits) for cache in caches.make_prompt_cache(model)]
    expected = mx.concatenate([model(TOKENS[:, i : i + 1], cache=theirs) for i in range(20)], axis=1)  # one by one
    plain = model(TOKENS)
    assert mx.abs(ours - expected).max().item() < 0.02 * mx.abs(plain - expected).max().item()


def test_keys_and_values_are_rounded_apart() -> None:
    model = build_model(CONFIGS["tied"])
    model.set_dtype(mx.float32)
    plain, far = model(TOKENS), {}
    for bits in ((None, None), (2, None), (None, 2), (2, 2)):
        moved = RoundingCaches(model, Rounding(*bits, 32, mx.float32))(TOKENS) - plain
        far[bits] = mx.abs(moved).max().item()
    assert far[None, None] < 1e-4
    assert min(far[2, None], far[None, 2], far[2, 2]) > 1e-3
    assert len({far[2, None], far[None, 2], far[2, 2]}) == 3


def test_scales_have_the_dtype_that_is_stored_not_the_one_computed_in() -> None:
    x = mx.random.normal((1, 1, 4, 64), key=mx.random.key(1))
    half = Rounding(4, 4, 64, mx.bfloat16).rounded(x, 4)
    packed = mx.quantize(x.astype(mx.bfloat16), 64, 4)
    expected = mx.dequantize(packed[0], *(s.astype(mx.float32) for s in packed[1:]), 64, 4)
    assert half.dtype == mx.float32
    assert mx.array_equal(half, expected)
    assert not mx.array_equal(half, Rounding(4, 4, 64, mx.float32).rounded(x, 4))
