"""Finding the repeated blocks of a model."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_tune as mt
from mlx_tune.checkpointing import find_blocks
from mlx_tune.checkpointing.block.wrap import kept_names


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def __call__(self, x):
        return mx.tanh(self.inner(x))


class Other(Block):
    pass


class Experts(Block):
    def __init__(self):
        super().__init__()
        self.experts = [Block() for _ in range(4)]


def module(**children):
    made = nn.Module()
    for name, child in children.items():
        made[name] = child
    return made


def stack(kind=Block, count=2):
    return [kind() for _ in range(count)]


def paths(model, select=None):
    return [[path for path, _ in found] for found in find_blocks(model, select)]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(*stack()), [["layers.0", "layers.1"]]),
        (
            nn.Transformer(4, 1, 2, 3),
            [
                ["encoder.layers.0", "encoder.layers.1"],
                ["decoder.layers.0", "decoder.layers.1", "decoder.layers.2"],
            ],
        ),
        (module(stages=[stack(), stack()]), [["stages.0.0", "stages.0.1"], ["stages.1.0", "stages.1.1"]]),
        (module(layers=stack(Experts)), [["layers.0", "layers.1"]]),
        (module(layers=[Block(), Experts(), nn.Linear(2, 2)]), [["layers.0", "layers.1"]]),
        (module(layers=(Block(), Block())), [["layers.0", "layers.1"]]),
        (module(layers={"a": Block(), "b": Block()}), [["layers.a", "layers.b"]]),
        (module(body=module(inner=module(layers=stack()))), [["body.inner.layers.0", "body.inner.layers.1"]]),
        (module(down1=Block(), mid=module(inner=Other()), down2=Block()), [["down1", "down2"]]),
        (module(layers=[None, *stack()]), [["layers.1", "layers.2"]]),
    ],
    ids=["list", "transformer", "nested", "experts", "mixed", "tuple", "dict", "deep", "attributes", "holes"],
)
def test_stacks(model, expected):
    assert paths(model) == expected


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("encoder.layers.*", [["encoder.layers.0", "encoder.layers.1"]]),
        ("*.layers.1", [["encoder.layers.1"], ["decoder.layers.1"]]),
        (lambda path, module: isinstance(module, nn.MultiHeadAttention) and "decoder" not in path, None),
        ("encoder", [["encoder"]]),
    ],
)
def test_select(select, expected):
    model = nn.Transformer(4, 1, 2, 2)
    expected = expected or [["encoder.layers.0.attention"], ["encoder.layers.1.attention"]]
    assert paths(model, select) == expected
    handle = mt.checkpoint_blocks(model, select=select)
    assert list(handle.paths) == [path for found in expected for path in found]


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every(every):
    model = nn.Sequential(*stack(count=5))
    handle = mt.checkpoint_blocks(model, every=every)
    assert [mt.is_checkpointed(layer) for layer in model.layers] == [i % every == 0 for i in range(5)]
    assert len(handle.paths) == len(range(0, 5, every))
    assert handle.undo() == len(handle.paths)
    assert handle.undo() == 0
    assert not any(mt.is_checkpointed(layer) for layer in model.layers)


def test_handle_undoes_its_own_blocks_only():
    model = nn.Sequential(*stack(count=3))
    mt.checkpoint(model.layers[1])
    with mt.checkpoint_blocks(model) as handle:
        assert all(mt.is_checkpointed(layer) for layer in model.layers)
        assert json.loads(json.dumps(handle.to_dict())) == {
            "paths": ["layers.0", "layers.1", "layers.2"],
            "found": 3,
            "active": 2,
        }
    assert [mt.is_checkpointed(layer) for layer in model.layers] == [False, True, False]


def test_table():
    model = nn.Sequential(*stack(count=3))
    with mt.checkpoint_blocks(model, every=2) as handle:
        assert str(handle) == (
            "2 of 3 blocks checkpointed\n"
            "block     class  checkpointed\n"
            "--------  -----  ------------\n"
            "layers.0  Block  yes\n"
            "layers.2  Block  yes"
        )
    assert str(handle) == (
        "0 of 3 blocks checkpointed\n"
        "block     class  checkpointed\n"
        "--------  -----  ------------\n"
        "layers.0  Block  no\n"
        "layers.2  Block  no"
    )


def test_a_block_that_was_checkpointed_before_is_so_in_the_table_and_keeps_its_names():
    class Marked(Block):
        def __call__(self, x):
            return mt.keep(mt.keep(super().__call__(x), "first"), "second")

    model = nn.Sequential(*stack(Marked))
    mt.checkpoint(model.layers[1], keep=["first"])
    with mt.checkpoint_blocks(model, keep=["second"]) as handle:
        assert str(handle).count("yes") == 2
        assert kept_names(model.layers[1]) == {"second"}
    assert kept_names(model.layers[1]) == {"first"}
    assert "1 of 2 blocks checkpointed" in str(handle)
    with mt.checkpoint_blocks(model):
        assert kept_names(model.layers[1]) == {"first"}


def test_a_block_in_the_list_twice():
    block = Block()
    model = nn.Sequential(block, block)
    handle = mt.checkpoint_blocks(model)
    assert handle.paths == ("layers.0", "layers.1")
    assert handle.undo() == 1


def test_no_repeated_block_names_what_was_looked_at():
    model = module(first=nn.Linear(2, 2), body=Block(), layers=[nn.Linear(2, 2), nn.ReLU()])
    with pytest.raises(mt.CheckpointError, match=r"no repeated block.*first \(Linear\), body \(Block\), body.inner"):
        mt.checkpoint_blocks(model)


def test_long_lists_of_what_was_looked_at_are_cut():
    with pytest.raises(mt.CheckpointError, match=r"and 8 more\.") as caught:
        mt.checkpoint_blocks(nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)]))
    assert "layers.11" in str(caught.value)
    with pytest.raises(mt.CheckpointError, match="holds no modules at all"):
        mt.checkpoint_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"every": True}, "every=True"),
        ({"select": 3}, "select=3"),
        ({"keep": "name"}, "keep="),
    ],
)
def test_wrong_arguments_change_nothing(arguments, text):
    model = nn.Sequential(*stack())
    with pytest.raises(mt.InvalidArgumentError, match=text):
        mt.checkpoint_blocks(model, **arguments)
    assert not any(mt.is_checkpointed(layer) for layer in model.layers)


def test_nothing_selected():
    with pytest.raises(mt.CheckpointError, match="'nowhere' selects no module of Sequential"):
        mt.checkpoint_blocks(nn.Sequential(*stack()), select="nowhere")
    with pytest.raises(mt.InvalidArgumentError, match="this is int"):
        find_blocks(3)


def test_a_failure_half_way_undoes_the_first_half():
    class Meta(type):
        def __new__(cls, name, bases, names):
            if any(isinstance(base, Meta) for base in bases):
                raise TypeError("final")
            return super().__new__(cls, name, bases, names)

    class Final(Block, metaclass=Meta):
        pass

    model = nn.Sequential(Block(), Block(), Final())
    with pytest.raises(mt.CheckpointError, match="Final"):
        mt.checkpoint_blocks(model)
    assert not any(mt.is_checkpointed(layer) for layer in model.layers)
