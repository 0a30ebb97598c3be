from __future__ import annotations

import json

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_stand_in import MetalStandIn, metal
from mlx_lm.models.cache import make_prompt_cache
from workload_models import language_model

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.devices import backend
from mlx_tune.lm.generation import grow
from mlx_tune.lm.generation_result import GenerationTrial

__all__ = ["metal"]


def trial(size: int, predicted: int | None, peak: int, budget: int) -> GenerationTrial:
    return GenerationTrial(size, predicted, peak, peak, 1.0, peak <= budget)


@settings(deadline=None, max_examples=200)
@given(
    base=st.integers(10**6, 10**9),
    row=st.integers(10**4, 10**7),
    share=st.floats(1.0, 300.0),
    most=st.one_of(st.none(), st.integers(1, 500)),
)
def test_growing_finds_the_largest_on_lines_within_the_margin(base: int, row: int, share: float, most) -> None:
    budget = int(base + share * row)
    tried = []

    def measure(size: int, predicted: int | None) -> GenerationTrial:
        tried.append(size)
        return trial(size, predicted, base + size * row, budget)

    trials, next_bytes = grow(measure, budget, most, base)
    exact = (budget - base) // row if most is None else min(most, (budget - base) // row)
    if exact < 1:
        assert tried == [1]
        return
    found = max(t.batch_size for t in trials if t.fits)
    assert found <= exact
    assert found == exact or found >= 0.94 * exact - 1  # the margin of the prediction
    assert all(base + size * row <= budget for size in tried)
    assert len(tried) == len(set(tried)) <= 20
    assert next_bytes is None or next_bytes > budget


def test_growing_stops_at_once_where_nothing_fits() -> None:
    trials, next_bytes = grow(lambda size, predicted: trial(size, predicted, 10, 5), 5, None)
    assert len(trials) == 1
    assert next_bytes is None


@pytest.mark.parametrize("name", ["tied", "moe"])
def test_the_answer_fits_and_says_what_each_size_gives(toy, name: str) -> None:
    model = toy(name)
    model.train()
    flags = [module.training for module in model.modules()]
    budget = mx.get_active_memory() + 3_000_000
    result = lm.autobatch_generate(
        model, prompt_tokens=20, max_tokens=40, budget=budget, max_batch=6, steps=2, progress=False
    )
    assert [module.training for module in model.modules()] == flags
    assert all(t.peak_bytes <= budget for t in result.trials if t.fits)
    assert result.trials[0].batch_size == 1
    assert 1 <= result.knee <= result.batch_size <= 6
    text = str(result)
    assert f"Largest batch to generate 40 tokens after 20: {result.batch_size}" in text
    assert "lowest latency" in text or result.batch_size == 1
    assert json.loads(json.dumps(result.to_dict()))["knee"] == result.knee


def test_caches_have_their_final_length(toy) -> None:
    model = toy()
    peaks = {}
    for length in (30, 600):
        result = lm.autobatch_generate(
            model, prompt_tokens=8, max_tokens=length, budget="1GB", max_batch=4, steps=2, progress=False
        )
        assert result.batch_size == 4
        peaks[length] = result.trials[-1].peak_bytes
        cache = make_prompt_cache(model)
        model(mx.zeros((1, 8 + length - 3), mx.int32), cache=cache)
        mx.eval([c.state for c in cache])
        assert result.cache_bytes_per_row == sum(c.nbytes for c in cache)
        del cache
    assert peaks[600] - peaks[30] >= 4 * 3 * 2 * 32 * 4 * 512  # rows, layers, keys and values, head, bytes, tokens


@pytest.mark.skipif(backend() == "cuda", reason="CUDA has no packed product of 32 inputs: ml-explore/mlx#2536")
def test_a_quantized_cache_takes_less(toy) -> None:
    model = toy()
    options = {"prompt_tokens": 8, "max_tokens": 400, "budget": "1GB", "max_batch": 4, "steps": 2, "progress": False}
    plain = lm.autobatch_generate(model, **options)
    small = lm.autobatch_generate(model, **options, kv_bits=4, kv_group_size=32)
    assert small.cache_bytes_per_row < 0.35 * plain.cache_bytes_per_row
    assert "no quantized cache" in small.notes[0]
    assert "4-bit cache" in str(small)


def test_the_wired_limit_is_put_back(toy, metal: MetalStandIn) -> None:
    metal.limit = 5 << 30
    lm.autobatch_generate(toy(), prompt_tokens=4, max_tokens=4, budget="1GB", max_batch=1, progress=False)
    assert metal.recommended_bytes in metal.limits
    assert metal.limit == 5 << 30


def test_it_draws(toy, tmp_path) -> None:
    result = lm.autobatch_generate(toy(), prompt_tokens=4, max_tokens=4, budget="1GB", max_batch=2, progress=False)
    result.plot(tmp_path / "rates.svg", dark=True)
    assert (tmp_path / "rates.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"steps": 0}, "steps=0"),
        ({"kv_bits": 7}, "kv_bits=7"),
        ({"kv_bits": 4, "kv_group_size": 128}, "kv_group_size=128"),
    ],
)
def test_bad_input_is_named(toy, options, text: str) -> None:
    with pytest.raises(mt.InvalidArgumentError, match=text):
        lm.autobatch_generate(toy(), **({"prompt_tokens": 4, "max_tokens": 4, "progress": False} | options))


@pytest.mark.parametrize(
    ("family", "kv_bits", "text"),
    [
        ("lfm2", 4, "has a ArraysCache, which mlx-lm cannot quantize"),
        ("gemma3_text", 4, "the cache cannot be quantized so: RotatingKVCache"),
        ("gemma2", 4, "mlx_lm.models.gemma2 does not generate in a batch of 1 on a 4-bit cache: "),
    ],
)
def test_architectures_that_mlx_lm_cannot_serve_are_named(family: str, kv_bits: int, text: str) -> None:
    model = language_model(family)
    options = {"prompt_tokens": 40, "max_tokens": 4, "max_batch": 2, "steps": 1, "progress": False}
    with pytest.raises(mt.InvalidArgumentError, match=text):
        lm.autobatch_generate(model, kv_bits=kv_bits, kv_group_size=32, **options)


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "falcon_h1", "mamba2"])
def test_caches_of_every_kind_are_filled(family: str) -> None:
    model = language_model(family)
    options = {"prompt_tokens": 20, "max_tokens": 8, "max_batch": 2, "steps": 1, "budget": "1GB", "progress": False}
    result = lm.autobatch_generate(model, **options)
    assert result.batch_size == 2
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 20 + 8 - 1 - 1), mx.int32), cache=cache)
    mx.eval([c.state for c in cache])
    assert result.cache_bytes_per_row == sum(c.nbytes for c in cache)


def test_one_row_that_does_not_fit_is_an_error_with_both_figures(toy) -> None:
    with pytest.raises(mt.BudgetError, match="One row does not fit") as caught:
        lm.autobatch_generate(toy(), prompt_tokens=8, max_tokens=8, budget="100kB", progress=False)
    assert caught.value.needed_bytes > caught.value.budget_bytes == 100_000
