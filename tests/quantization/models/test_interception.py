from functools import partial

from block_models import Block, make, tokens

from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.quantization.models.interception import forward_steps, run_until


def linear_paths(model):
    return [(f"layers.{i}.{n}", getattr(model.layers[i], n)) for i in range(len(model.layers)) for n in ("one", "two")]


def test_steps_come_in_the_order_of_the_forward_pass():
    model = make()
    layers = [("embed", model.embed), *linear_paths(model), ("unused", model.unused)]
    steps = forward_steps(partial(tokens(1)[0].inputs.call, model), layers, blocks_of(model))
    assert [(s.path, s.follows, s.like, s.calls) for s in steps] == [
        ("embed", None, "embed", 2),
        ("layers.0", None, "layers.0", 1),
        ("layers.1", "layers.0", "layers.0", 1),
        ("layers.2", "layers.1", "layers.0", 1),
    ]
    assert type(model.layers[0]) is Block


def test_steps_that_do_not_follow_one_another_are_noticed():
    model = make(chained=False)
    steps = forward_steps(partial(tokens(1)[0].inputs.call, model), linear_paths(model), blocks_of(model))
    assert [s.follows for s in steps] == [None, None, None]


def test_running_stops_where_it_has_seen_enough():
    model = make()
    seen = []

    def hook(call):
        seen.append(call.inputs.shape)

    run_until(partial(tokens(1)[0].inputs.call, model), model.layers[1], 1, hook)
    assert seen == [(4, 16, 128)]
    assert type(model.layers[1]) is Block
