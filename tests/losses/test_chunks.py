"""Chunks of any loss of logits: each token once, in order, and an array that waits for others."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_tune as mt
from mlx_tune.errors import InvalidArgumentError
from mlx_tune.losses.chunks import after, chunked_loss


def chunked(tokens, *, chunk, weights=None, reduction="none", places=None):
    """The sum of each token's logits, which are its number and twice that."""

    def losses_of(logits, at):
        if places is not None:
            places.append((at.start, at.stop))
        return logits.sum(-1)

    hidden, head = mx.arange(tokens, dtype=mx.float32)[:, None], mx.array([[1.0], [2.0]])
    return chunked_loss(hidden, head, losses_of, weights=weights, reduction=reduction, chunk_tokens=chunk)


@pytest.mark.parametrize(("tokens", "chunk", "count"), [(1, 1, 1), (7, 3, 3), (8, 4, 2), (5, 9, 1)])
def test_each_token_is_in_one_chunk(tokens, chunk, count):
    places = []
    assert np.array(chunked(tokens, chunk=chunk, places=places)).tolist() == [3.0 * i for i in range(tokens)]
    assert len(set(places)) == count
    assert sorted(i for place in set(places) for i in range(*place)) == list(range(tokens))


def test_weights_and_reductions():
    weights = mx.array([1.0, 0.0, 2.0, 0.5])
    assert chunked(4, chunk=3, weights=weights).tolist() == [0.0, 0.0, 12.0, 4.5]
    assert chunked(4, chunk=3, weights=weights, reduction="sum").item() == 16.5
    assert chunked(4, chunk=3, weights=weights, reduction="mean").item() == 16.5 / 4
    with pytest.raises(InvalidArgumentError, match=r"weights \[3\] for tokens \[4\]"):
        chunked(4, chunk=3, weights=mx.ones((3,)))


def test_what_waits_for_others_is_not_there_before_them():
    """Two large arrays that are needed at the end: one after the other, as few of their parts are alive as can be."""
    x = mx.ones((256, 256))

    def parts(ordered):
        total, done = mx.zeros(()), []
        for i in range(4):
            made = mx.tile(after(x + i, done), (8, 1)) if ordered else mx.tile(x + i, (8, 1))
            total = total + (made @ x).sum()
            done = [total]
        return total

    floors = [mt.estimate_memory(lambda ordered=ordered: parts(ordered)).floor_bytes for ordered in (False, True)]
    assert floors[1] <= floors[0]
    assert mx.allclose(parts(True), parts(False))
    assert after(x, []) is x


def test_a_head_that_does_not_take_the_states_is_named():
    with pytest.raises(InvalidArgumentError, match="width of 3, which Linear does not take"):
        chunked_loss(
            mx.zeros((2, 3)), nn.Linear(4, 5), lambda x, at: x, weights=None, reduction="sum", chunk_tokens=None
        )
