"""What blocks are called with, which of them are alike, and how long they take."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_tune.checkpointing.planning.costs import Calls, block_kind, forward_seconds, recorded
from mlx_tune.errors import CheckpointError
from mlx_tune.graphs.arguments import ArraySpec


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.calls = 0

    def __call__(self, x, mask=None, *, scale=1.0, cache=None):
        self.calls += 1
        y = self.down(nn.relu(self.up(x))) * scale
        return y if mask is None else y * mask


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(10, 4)

    def __call__(self, tokens, keep):
        return mx.where(keep[..., None], self.rows(tokens), 0.0)


def test_calls_are_noted_with_shapes_and_the_rest_as_it_is():
    first, second = Block(4, 8), Block(4, 8)
    mask = mx.ones((2, 1), dtype=mx.bool_)
    with recorded({"a": first, "b": second}) as calls:
        assert isinstance(first, Block)
        second(first(mx.ones((2, 4)), mask, scale=0.5))
        second(mx.ones((3, 4)))
    assert type(first) is type(second) is Block
    assert calls["a"].inputs == [
        ((ArraySpec((2, 4), mx.float32), ArraySpec((2, 1), mx.bool_)), {"scale": 0.5}),
    ]
    assert [args[0].shape for args, _ in calls["b"].inputs] == [(2, 4), (3, 4)]
    assert (calls["a"].first, calls["b"].first) == (0, 1)


def test_blocks_are_themselves_again_after_an_error():
    block = Block(4, 8)
    with pytest.raises(ValueError, match="mine"), recorded({"a": block}):
        raise ValueError("mine")
    assert type(block) is Block


def spec(*shape):
    return Calls([((ArraySpec(shape, mx.float32),), {})])


def test_blocks_that_do_the_same_work_are_one_kind():
    assert block_kind(Block(4, 8), spec(2, 4)) == block_kind(Block(4, 8), spec(2, 4))


@pytest.mark.parametrize(
    "other",
    [
        lambda: block_kind(Block(4, 16), spec(2, 4)),
        lambda: block_kind(Block(4, 8), spec(3, 4)),
        lambda: block_kind(frozen(Block(4, 8)), spec(2, 4)),
        lambda: block_kind(halved(Block(4, 8)), spec(2, 4)),
        lambda: block_kind(type("Other", (Block,), {})(4, 8), spec(2, 4)),
        lambda: block_kind(Block(4, 8), Calls([((ArraySpec((2, 4), mx.float32), "causal"), {})])),
        lambda: block_kind(Block(4, 8), Calls(spec(2, 4).inputs * 2)),
    ],
)
def test_blocks_that_differ_in_work_are_two_kinds(other):
    assert block_kind(Block(4, 8), spec(2, 4)) != other()


def frozen(block):
    block.freeze()
    return block


def halved(block):
    block.set_dtype(mx.float16)
    return block


def test_a_forward_pass_is_timed_for_each_call():
    block = Block(4, 8)
    assert forward_seconds("a", block, spec(2, 4)) > 0
    once, block.calls = block.calls, 0
    forward_seconds("a", block, Calls(spec(2, 4).inputs * 3))
    assert block.calls == 3 * once


def test_indices_and_masks_are_made_so_that_the_block_runs():
    calls = Calls([((ArraySpec((2, 3), mx.int32), ArraySpec((2, 3), mx.bool_)), {})])
    assert forward_seconds("table", Table(), calls) > 0


def test_a_block_that_does_not_run_alone_is_named():
    class Picky(nn.Module):
        def __call__(self, x):
            raise KeyError("position")

    with pytest.raises(CheckpointError, match=r"time of layers\.3 could not be measured: Picky .*KeyError.*select="):
        forward_seconds("layers.3", Picky(), spec(2, 4))


def test_timing_changes_no_parameter():
    block = Block(4, 8)
    before = {name: value.tolist() for name, value in tree_flatten(block.parameters())}
    forward_seconds("a", block, spec(2, 4))
    assert {name: value.tolist() for name, value in tree_flatten(block.parameters())} == before
