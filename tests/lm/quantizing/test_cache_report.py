"""What a quantized cache costs: the figures of mlx-lm's own quantized cache, and its bytes."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as caches
from toy_models import CONFIGS, build_model

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.trees import nbytes_of


@pytest.fixture
def evaluation() -> list[mx.array]:
    return [mx.random.randint(0, 320, (3, 24), key=mx.random.key(i)) for i in range(2)]


def test_figures_bytes_and_contexts(evaluation) -> None:
    model = build_model(CONFIGS["tied"])  # three layers of one head, 32 wide, in bfloat16
    before = mx.random.state[0].tolist()
    report = lm.cache_report(model, evaluation, kv_bits=(8, 4), group_size=32, budget="1GB", progress=False)
    assert mx.random.state[0].tolist() == before
    names = ["as it is", "8 bits", "keys 8 bits", "values 8 bits", "4 bits", "keys 4 bits", "values 4 bits"]
    assert [str(cost) for cost in report.costs] == names
    whole, eight, four = 3 * 32 * 2, 3 * (32 + 4), 3 * (16 + 4)  # of keys; the same of values
    sizes = [cost.bytes_per_token for cost in report.costs]
    half_packed = [whole + eight] * 2, [whole + four] * 2
    assert sizes == [2 * whole, 2 * eight, *half_packed[0], 2 * four, *half_packed[1]]
    assert report.weights_bytes == nbytes_of(model.parameters())
    assert [x.longest_context for x in report.costs] == [(10**9 - report.weights_bytes) // size for size in sizes]
    assert report.costs[0].accuracy is None
    kl = {str(cost): cost.accuracy.mean_kl for cost in report.costs[1:] if cost.accuracy is not None}
    assert 0 < kl["8 bits"] < kl["4 bits"]
    assert max(kl["keys 4 bits"], kl["values 4 bits"]) < kl["4 bits"] * 1.5
    assert all(cost.accuracy.mean_kl_error > 0 for cost in report.costs[1:] if cost.accuracy is not None)
    assert np.isfinite([cost.accuracy.perplexity_ratio for cost in report.costs[1:] if cost.accuracy]).all()
    assert "Half precision alone" in report.notes[0]
    assert "138 tokens of 6 sequences" in report.notes[1]
    assert "keys 4 bits" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["costs"][4]["key_bits"] == 4


def test_the_room_that_mlx_lm_makes_is_the_room_that_is_counted() -> None:
    model = build_model(CONFIGS["tied"])
    theirs = [cache.to_quantized(32, 4) for cache in caches.make_prompt_cache(model)]
    model(mx.zeros((1, 256), dtype=mx.int32), cache=theirs)  # as many as it makes room for at once
    size = sum(a.nbytes for cache in theirs for a in (*cache.keys, *cache.values))
    tokens = [mx.zeros((2, 4), dtype=mx.int32)]
    report = lm.cache_report(model, tokens, kv_bits=[4], group_size=32, progress=False)
    assert report.costs[1].bytes_per_token * 256 == size


def test_caches_of_other_kinds_are_named(evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(CONFIGS["tied"])
    monkeypatch.setattr(
        type(model), "make_cache", lambda self: [caches.KVCache(), *(caches.RotatingKVCache(16) for _ in "ab")],
        raising=False,
    )  # fmt: skip
    report = lm.cache_report(model, evaluation, kv_bits=[4], group_size=32, progress=False)
    assert "2 of kind RotatingKVCache stay as they are" in report.notes[0]
    assert report.costs[0].bytes_per_token == 2 * 32 * 2
    monkeypatch.setattr(type(model), "make_cache", lambda self: [caches.RotatingKVCache(16) for _ in "abc"])
    with pytest.raises(mt.InvalidArgumentError, match="caches are RotatingKVCache: --kv-bits quantizes KVCache alone"):
        lm.cache_report(model, evaluation, group_size=32, progress=False)


def test_a_model_that_cannot_use_a_quantized_cache_is_named(evaluation) -> None:
    model = build_model(CONFIGS["tied"] | {"model_type": "gemma2"})
    with pytest.raises(mt.InvalidArgumentError, match="mlx-lm's gemma2 cannot use a quantized cache: TypeError"):
        lm.cache_report(model, evaluation, group_size=32, progress=False)


def test_bad_arguments_are_named(evaluation) -> None:
    model = build_model(CONFIGS["tied"])
    with pytest.raises(mt.InvalidArgumentError, match=r"kv_bits=\(8, 3\): mlx-lm's quantized cache has 2, 4 and 8"):
        lm.cache_report(model, evaluation, kv_bits=(8, 3))
    with pytest.raises(mt.InvalidArgumentError, match="group_size=48"):
        lm.cache_report(model, evaluation, group_size=48)
    with pytest.raises(mt.InvalidArgumentError, match=r"Heads 32 wide .* groups of 64: group_size=32 would do"):
        lm.cache_report(model, evaluation, group_size=64)
    with pytest.raises(mt.QuantizationError, match="evaluation"):
        lm.cache_report(model, [], group_size=32)
