from __future__ import annotations

import mlx.core as mx
import pytest
from keeping_up import throttled_peak
from mlx_lm.generate import _merge_caches
from mlx_lm.models.cache import make_prompt_cache
from workload_models import configuration

import mlx_tune as mt
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.capacity.inference import RunModel, generation_fit
from mlx_tune.lm.capacity.unloaded import Unloaded

SIZES = {"num_hidden_layers": 6, "hidden_size": 256, "vocab_size": 4096}
CONFIG = configuration("llama", **SIZES) | {"torch_dtype": "float32"}


@pytest.mark.cpu_only
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "mamba2"])
def test_reading_is_predicted_as_it_is_measured(family):
    config = configuration(family, **SIZES) | {"torch_dtype": "float32"}
    model = Unloaded(config).build()
    mx.eval(model.parameters())

    def read() -> None:
        caches = _merge_caches([make_prompt_cache(model) for _ in range(2)])
        model(mx.zeros((2, 255), mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])

    held = mx.get_active_memory() - RunModel(Unloaded(config), "cpu").weights_bytes
    measured = min(throttled_peak(read) for _ in range(3)) - held
    predicted = RunModel(Unloaded(config), "cpu").reading(2, 256).peak_bytes
    assert predicted == pytest.approx(measured, rel=0.06)


_REAL = {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 128, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("family", "backend", "sizes"),
    [("llama", "cpu", {}), ("deepseek_v3", "cpu", {}), ("gemma3_text", "cpu", {}), ("llama", "metal", _REAL)],
)
def test_short_models_say_what_the_whole_one_holds(family, backend, sizes, monkeypatch):
    from mlx_tune.lm.capacity import inference

    unloaded = Unloaded(configuration(family, **sizes, num_hidden_layers=16))
    short = RunModel(unloaded, backend)
    monkeypatch.setattr(inference, "find_runs", lambda kinds, least: ())
    whole = RunModel(unloaded, backend)
    for rows in (1, 12):
        assert short.cache_bytes(rows, 300) == whole.cache_bytes(rows, 300)
        for ours, theirs in ((short.reading, whole.reading), (short.writing, whole.writing)):
            assert ours(rows, 300).peak_bytes == pytest.approx(theirs(rows, 300).peak_bytes, rel=0.03)


def test_the_answers_are_the_largest_that_fit():
    config = CONFIG | {"max_position_embeddings": 100_000}
    run, budget = RunModel(Unloaded(config), "cpu"), 60_000_000
    found = generation_fit(Unloaded(config), "cpu", budget, context=512, batch_size=2, kv_bits=None, longest=100_000)
    room = budget / 1.03
    assert found.fits
    assert not found.context_limited
    assert run.floor(found.largest_batch, 512).bytes <= room * 1.01
    assert run.floor(found.largest_batch + 1, 512).bytes > room * 0.99
    assert run.floor(1, found.longest_context).bytes <= room * 1.01
    assert run.floor(1, found.longest_context + 512).bytes > room * 0.99


def test_fits_answers_for_generating_where_it_is_asked():
    answer = mt.lm.fits(CONFIG, machine="M1 8GB", max_seq_length=64, context=256, generate_batch=4)
    assert "Generating fits: batch 4 at 256 tokens" in str(answer)
    assert answer.to_dict()["generation"]["longest_context"] == 512


def test_an_architecture_that_takes_no_batch_is_answered_for_one_row():
    options = {"machine": "M1 8GB", "max_seq_length": 64, "context": 256}
    gemma = configuration("gemma2", num_hidden_layers=2)
    answer = mt.lm.fits(gemma, **options)
    assert answer.generation.largest_batch == 1
    assert "takes no larger one" in str(answer)
    with pytest.raises(InvalidArgumentError, match=r"gemma2 does not generate in a batch of 4: .*broadcast"):
        mt.lm.fits(gemma, **options, generate_batch=4)
