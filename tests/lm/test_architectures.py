"""mlx-lm's architectures with every block checkpointed: what mlx-lm's own model tests hold of the plain ones."""

from __future__ import annotations

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from workload_models import FAMILIES, VOCABULARY, language_model

import mlx_tune as mt


@pytest.mark.cpu_only
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpointed_model_computes_and_copies_like_the_plain_one(family: str) -> None:
    mx.random.seed(0)
    model = language_model(family)
    mx.eval(model.parameters())
    tokens = mx.array([[0, 1, 5], [2, 3, 4]])

    def outputs() -> list[mx.array]:
        cache = make_prompt_cache(model)
        return [model(tokens), model(tokens, cache=cache), model(tokens[:, :1], cache=cache)]

    plain = outputs()
    assert plain[0].shape == (2, 3, VOCABULARY)
    for training in (True, False):
        model.train(training)
        with mt.checkpoint_blocks(model) as handle:
            assert len(handle.paths) == len(model.layers)
            for ours, theirs in zip(outputs(), plain, strict=True):
                assert ours.dtype == theirs.dtype
                assert mx.array_equal(ours, theirs)
            assert mx.array_equal(copy.deepcopy(model)(tokens), plain[0])
