"""The answer: applied around training, and taken by `lm.train`."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import pytest

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.lm.lengths.result import LongestSequence, Way


@pytest.mark.parametrize(("checkpoint", "tokens"), [(False, None), (True, None), (True, 16), (False, 16)])
def test_a_way_is_applied_and_undone(toy, checkpoint, tokens):
    model = toy(lora=True)
    way = Way("some", checkpoint, tokens, 33, 10**6)
    answer = LongestSequence(33, 1, 1, way, 10**6, 1.0, 10**9, (way,), "no row cut", (), model)
    before = mx.set_memory_limit(2 * 10**9)
    try:
        with answer.applied():
            assert mx.set_memory_limit(10**9) == 10**9
            assert [mt.is_checkpointed(layer) for layer in model.layers] == [checkpoint] * len(model.layers)
            assert [mt.is_tiled(layer.mlp) for layer in model.layers] == [tokens is not None] * len(model.layers)
        assert mx.set_memory_limit(before) == 2 * 10**9
    finally:
        mx.set_memory_limit(before)
    assert not any(mt.is_tiled(part) or mt.is_checkpointed(part) for part in model.modules())


def test_a_way_that_takes_no_row_says_so():
    ways = Way("plain", False, None), Way("checkpoint", True, None, 33, 10**6)
    text = str(LongestSequence(33, 1, 1, ways[1], 2 * 10**6, 1.0, 10**9, ways, "no row cut", ("a note",)))
    assert "plain" in text
    assert "none" in text
    assert "a note" in text
    assert "2.00 MB, measured" in text


@pytest.mark.usefixtures("adapters_exist")
def test_a_run_takes_the_answer(toy, rows, arguments):
    model = toy(lora=True)
    asked = arguments(batch_size=1, grad_checkpoint=True)
    answer = lm.longest_sequence(model, rows, asked, budget="1GB", max_length=48)
    result = lm.train(model, optim.SGD(1e-2), rows, None, arguments(batch_size=4), fit=answer)
    assert result.batch_size == 1
    assert result.limit_bytes == 10**9
    assert len(result.checkpointed) == 3
    assert result.truncation == answer.truncation == str(lm.truncation(rows, 48))
