from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.generate import _merge_caches
from mlx_lm.models.cache import make_prompt_cache
from workload_models import configuration

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.capacity.caches import cache_arrays, filled_caches, with_arrays
from mlx_tune.lm.capacity.unloaded import Unloaded

FAMILIES = ["llama", "gemma3_text", "mamba2", "deepseek_v3", "falcon_h1"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_caches_are_as_large_as_after_really_reading(family, tokens):
    model = Unloaded(configuration(family) | {"torch_dtype": "float32"}).build()
    real = _merge_caches([make_prompt_cache(model) for _ in range(2)])
    model(mx.zeros((2, tokens), mx.int32), cache=real)
    mx.eval([cache.state for cache in real])
    made = filled_caches(model, 2, tokens)
    assert [a.shape for a in cache_arrays(made)] == [a.shape for a in cache_arrays(real)]
    assert [a.dtype for a in cache_arrays(made)] == [a.dtype for a in cache_arrays(real)]


def test_quantized_caches_are_smaller():
    model = Unloaded(configuration("llama", head_dim=64)).build()
    sizes = [sum(a.nbytes for a in cache_arrays(filled_caches(model, 1, 300, kv_bits=b))) for b in (4, 8, None)]
    assert sizes == sorted(set(sizes))


def test_a_cache_that_cannot_be_quantized_is_named():
    with pytest.raises(InvalidArgumentError, match="kv_bits=4: this model has a ArraysCache"):
        filled_caches(Unloaded(configuration("mamba2")).build(), 1, 8, kv_bits=4)


def test_joined_caches_grow_by_a_step():
    model = Unloaded(configuration("llama")).build()
    lengths = [cache_arrays(filled_caches(model, 1, 100, more, exact=True))[0].shape[2] for more in (0, 1)]
    assert lengths == [100, 356]


def test_copies_leave_the_caches_as_they_were():
    model = Unloaded(configuration("falcon_h1")).build()
    caches = filled_caches(model, 1, 20)
    arrays = cache_arrays(caches)
    copies = with_arrays(caches, [mx.ones(a.shape, a.dtype) for a in arrays])
    model(mx.zeros((1, 1), mx.int32), cache=copies)
    assert all(one is other for one, other in zip(cache_arrays(caches), arrays, strict=True))
