"""Tiling and undoing: what a tiled module still is, what is refused, and a model's MLPs all at once."""

import copy
import json
import pickle

import mlx.core as mx
import mlx.nn as nn
import pytest
from arithmetic import rounding
from mlx.utils import tree_flatten
from tiled_models import MLP, WIDTH, Adding, furthest, gradients, made
from toy_models import CONFIGS, build_model

import mlx_tune as mt
from mlx_tune.errors import CheckpointError, InvalidArgumentError


def test_in_place_this_instance_only_and_the_same_names():
    module, other = made("mlp"), made("mlp")
    names = [name for name, _ in tree_flatten(module.parameters())]
    assert mt.tile(module, 8) is module
    assert mt.is_tiled(module)
    assert not mt.is_tiled(other)
    assert repr(module) == repr(other)
    assert [name for name, _ in tree_flatten(module.parameters())] == names
    assert mt.untile(module) == 1
    assert mt.untile(module) == 0
    assert type(module) is MLP
    assert vars(module).keys() == vars(other).keys()
    assert module.keys() == other.keys()


@pytest.mark.parametrize("tokens", [0, -1, 1.5, True, "many", None])
def test_pieces_are_a_positive_number_of_positions(tokens):
    module = made("mlp")
    for call in (mt.tile, mt.tile_blocks):
        with pytest.raises(InvalidArgumentError, match="tokens="):
            call(module, tokens)
    assert type(module) is MLP


@pytest.mark.parametrize("call", [mt.tile, mt.untile])
def test_only_modules(call):
    with pytest.raises(InvalidArgumentError, match="takes an nn"):
        call(lambda x: x)


def test_what_mixes_positions_is_refused_and_left_as_it_was():
    module = nn.Conv1d(8, 8, 3, padding=1)
    with pytest.raises(CheckpointError, match="Conv1d cannot be tiled: changing position 0"):
        mt.tile(module)
    assert type(module) is nn.Conv1d


def test_what_takes_several_arrays_is_tried_at_its_first_call():
    module = mt.tile(nn.MultiHeadAttention(8, 2), 4)
    x = mx.ones((1, 9, 8))
    with pytest.raises(CheckpointError, match="MultiHeadAttention cannot be tiled: changing position"):
        module(x, x, x)


def test_what_cannot_be_tried_says_so():
    """Its first call is inside a compiled step, where its parameters have no values."""
    module, x = mt.tile(Adding(), 4), mx.ones((1, 9, WIDTH))
    step = mx.compile(lambda x: module(x, residual=x, scale=x, power=1), inputs=module.state)
    with pytest.warns(UserWarning, match="Adding is tiled, and it could not be tried"):
        step(x)
    step(mx.ones((1, 10, WIDTH)))  # and says it once


def test_a_checkpointed_module_is_refused():
    with pytest.raises(CheckpointError, match="is checkpointed"):
        mt.tile(mt.checkpoint(made("mlp")))


def test_tiling_again_sets_the_pieces_and_compiled_steps_notice():
    x, runs = mx.random.normal((1, 64, WIDTH)), []

    class Watched(MLP):
        def __call__(self, x):
            runs.append(x.shape[1])
            return super().__call__(x)

    module = Watched()
    step = mx.compile(lambda x: module(x), inputs=module.state)
    for tokens, expected in ((None, [64]), (32, [32] * 2), (16, [16] * 4)):
        if tokens:
            mt.tile(module, tokens)
        runs.clear()
        mx.eval(step(x))
        assert runs == expected
    mt.untile(module)
    runs.clear()
    mx.eval(step(x))
    assert runs == []  # the plain trace is there still


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_tiled_too(copied):
    module, x = mt.tile(made("mlp"), 4), mx.random.normal((1, 9, WIDTH))
    twin = copied(module)
    assert mt.is_tiled(twin)
    assert furthest(gradients(twin, x), gradients(module, x)) < 1e-6
    assert mt.untile(twin) == 1
    assert mt.is_tiled(module)


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_the_mlps_of_a_model(kind):
    model = build_model(CONFIGS[kind])
    model.set_dtype(mx.float32)
    tokens = mx.random.randint(0, 320, (2, 24))
    names = dict(tree_flatten(model.parameters())).keys()

    def loss(model):
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    def found():
        value, grads = nn.value_and_grad(model, loss)(model)
        return {"loss": value, **dict(tree_flatten(grads))}

    expected = found()
    with mt.tile_blocks(model, 16) as handle:
        assert handle.paths == tuple(f"model.layers.{i}.mlp" for i in range(3))
        assert "changing position" in handle.passed_over["model.layers.0.self_attn"]
        assert "model.layers.0.self_attn" in str(handle)
        assert json.loads(json.dumps(handle.to_dict()))["tokens"] == 16
        with mt.checkpoint_blocks(model):
            assert furthest(found(), expected) < rounding(2e-5)
        assert dict(tree_flatten(model.parameters())).keys() == names
    assert not any(mt.is_tiled(part) for part in model.modules())
    assert handle.undo() == 0


def test_selected_modules():
    model = build_model(CONFIGS["tied"])
    with mt.tile_blocks(model, 16, select="*.mlp") as handle:
        assert len(handle.paths) == 3
    with pytest.raises(CheckpointError, match=r"model.layers.0.self_attn: Attention cannot be tiled"):
        mt.tile_blocks(model, 16, select=lambda path, _: path.endswith(("self_attn", "mlp")))
    assert not any(mt.is_tiled(part) for part in model.modules())


def test_a_model_without_any():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixing = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8))

        def __call__(self, x):
            return self.mixing(x)

    with pytest.raises(CheckpointError, match=r"layers.0.mixing: changing position 0"):
        mt.tile_blocks(nn.Sequential(Block(), Block()))


def test_a_handle_leaves_what_was_tiled_before():
    model = build_model(CONFIGS["tied"])
    mt.tile(model.layers[1].mlp, 8)
    handle = mt.tile_blocks(model, 16)
    assert handle.undo() == 2
    assert mt.is_tiled(model.layers[1].mlp)
