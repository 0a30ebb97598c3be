"""Wrapping and unwrapping: what a wrapped module still is, and what it is again afterwards."""

import copy
import pickle
from functools import wraps

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlx_tune as mt


class Block(nn.Module):
    """A block with an attribute of every kind."""

    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.parts = [nn.Linear(width, width)]
        self.name = "a block"
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return mx.tanh(self.parts[0](self.inner(x)))


def gradients(block, x):
    return dict(tree_flatten(nn.value_and_grad(block, lambda x: block(x).sum())(x)[1]))


def same(a, b):
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


def test_in_place_this_instance_only_and_the_same_names():
    block, other = Block(), Block()
    names = [name for name, _ in tree_flatten(block.parameters())]
    assert mt.checkpoint(block) is block
    assert mt.is_checkpointed(block)
    assert not mt.is_checkpointed(other)
    assert type(other) is Block
    assert isinstance(block, Block)
    assert type(block).__name__ == "Block"
    assert repr(block) == repr(other)
    assert [name for name, _ in tree_flatten(block.parameters())] == names


def test_wrapping_twice_runs_the_body_twice_and_not_more():
    block = mt.checkpoint(mt.checkpoint(Block()))
    gradients(block, mx.ones((1, 4)))
    assert block.calls == 2
    assert mt.uncheckpoint(block) == 1
    assert type(block) is Block


def test_one_subclass_for_each_class():
    assert type(mt.checkpoint(Block())) is type(mt.checkpoint(Block()))


def test_undone_is_identical_to_never_wrapped():
    block, x = Block(), mx.ones((2, 4))
    attributes, kind = dict(vars(block)), type(block)
    expected = gradients(block, x)
    mt.checkpoint(block)
    gradients(block, x)
    assert mt.uncheckpoint(block) == 1
    assert mt.uncheckpoint(block) == 0
    assert type(block) is kind
    assert vars(block).keys() == attributes.keys()
    block.calls = 0
    assert same(gradients(block, x), expected)
    assert block.calls == 1


def test_uncheckpoint_finds_every_block_below():
    model = nn.Sequential(Block(), nn.Sequential(Block(), Block()))
    for module in model.modules():
        if type(module) is Block:
            mt.checkpoint(module)
    assert mt.uncheckpoint(model) == 3


def copied(block):
    return copy.deepcopy(block)


def shallow(block):
    return copy.copy(block)


def pickled(block):
    return pickle.loads(pickle.dumps(block))


@pytest.mark.parametrize("again", [copied, shallow, pickled], ids=lambda f: f.__name__)
def test_copies_are_checkpointed_too(again):
    block = mt.checkpoint(Block())
    other = again(block)
    assert mt.is_checkpointed(other)
    assert isinstance(other, Block)
    assert other is not block
    assert other.name == "a block"
    x = mx.ones((2, 4))
    assert same(gradients(block, x), gradients(other, x))
    assert other.calls == 2
    mt.uncheckpoint(other)
    assert mt.is_checkpointed(block)


def test_saved_and_loaded_into_a_plain_model(tmp_path):
    block, plain = mt.checkpoint(Block()), Block()
    block.save_weights(str(tmp_path / "weights.safetensors"))
    plain.load_weights(str(tmp_path / "weights.safetensors"), strict=True)
    x = mx.ones((2, 4))
    assert mx.array_equal(plain(x), block(x))


def test_kept_names_survive_copies():
    class Marked(nn.Linear):
        def __call__(self, x):
            return mx.sin(mt.keep(super().__call__(x), "product"))

    block = copy.deepcopy(mt.checkpoint(Marked(2, 2), keep=["product"]))
    with pytest.raises(mt.CheckpointError, match="other"):
        mt.checkpoint(copy.deepcopy(block), keep=["other"])(mx.ones((1, 2)))
    assert block(mx.ones((1, 2))).shape == (1, 2)


def test_evaluation_mode_runs_once_even_under_a_gradient():
    block, x = mt.checkpoint(Block()), mx.ones((2, 4))
    block.eval()
    expected = gradients(block, x)
    assert block.calls == 1
    block.train()
    assert same(gradients(block, x), expected)
    assert block.calls == 3


def test_without_a_gradient_the_body_runs_once():
    block = mt.checkpoint(Block())
    mx.eval(block(mx.ones((2, 4))))
    assert block.calls == 1


def test_functions():
    calls = []

    def square(x, *, times=1):
        """Doc."""
        calls.append(mt.is_recomputing())
        return x * x * times

    fast = mt.checkpoint(square)
    assert mt.is_checkpointed(fast)
    assert not mt.is_checkpointed(square)
    assert fast.__name__ == "square"
    assert fast.__doc__ == "Doc."
    assert fast.__wrapped__ is square
    assert mx.grad(lambda x: fast(x, times=3))(mx.array(2.0)).item() == 12
    assert calls == [False, True]
    assert mt.checkpoint(fast).__wrapped__ is square
    assert not mt.is_recomputing()


def test_a_function_around_a_checkpointed_one_is_not_checkpointed_itself():
    calls = []
    fast = mt.checkpoint(lambda x: calls.append(1) or x * x)

    @wraps(fast)
    def around(x):
        return fast(x) + 1

    assert not mt.is_checkpointed(around)
    assert mt.checkpoint(around).__wrapped__ is around
    assert mx.grad(around)(mx.array(3.0)).item() == 6
    assert len(calls) == 2


def test_objects_that_can_be_called():
    class Scale:
        def __init__(self):
            self.weight = mx.array(2.0)

        def __call__(self, x):
            return x * x * self.weight

    scale = Scale()
    fast = mt.checkpoint(scale)
    assert mt.is_checkpointed(fast)

    def loss(w):
        scale.weight = w
        return fast(mx.array(3.0))

    assert mx.grad(loss)(mx.array(1.0)).item() == 9


def test_decorated_method():
    class Holder:
        def __init__(self):
            self.weight = mx.array(3.0)

        @mt.checkpoint
        def run(self, x):
            return x * x * self.weight

    holder = Holder()

    def loss(w):
        holder.weight = w
        return holder.run(mx.array(2.0))

    assert mx.grad(loss)(mx.array(1.0)).item() == 4.0


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: mt.checkpoint(Block), "the class Block"),
        (lambda: mt.checkpoint(3), "was given int"),
        (lambda: mt.checkpoint(Block(), keep="product"), r"keep=\['product'\]"),
        (lambda: mt.checkpoint(Block(), keep=[3]), "was given 3"),
        (lambda: mt.uncheckpoint(lambda x: x), "__wrapped__"),
    ],
)
def test_wrong_arguments(wrong, text):
    with pytest.raises(mt.InvalidArgumentError, match=text):
        wrong()


def test_class_that_cannot_be_subclassed():
    class Final(type):
        def __new__(cls, name, bases, names):
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("it is final")
            return super().__new__(cls, name, bases, names)

    class Block(nn.Module, metaclass=Final):
        def __call__(self, x):
            return x

    block = Block()
    with pytest.raises(mt.CheckpointError, match=r"Block cannot be checkpointed.*it is final"):
        mt.checkpoint(block)
    assert type(block) is Block


def test_a_class_that_notes_its_subclasses_hears_nothing():
    noted = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, *, tag):
            noted[tag] = cls

    class Layer(Registered, tag="layer"):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def __call__(self, x):
            return self.inner(x)

    layer = mt.checkpoint(Layer())
    assert noted == {"layer": Layer}
    assert not mt.is_checkpointed(noted["layer"]())
    assert mt.is_checkpointed(copy.deepcopy(layer))
    mt.uncheckpoint(layer)
    assert type(layer) is Layer


def test_a_block_that_raises_leaves_everything_as_it_was():
    class Failing(Block):
        def __call__(self, x):
            y = super().__call__(x)
            if mt.is_recomputing() and self.name == "fails again":
                raise ValueError("second run")
            if mt.is_recomputing() and self.name == "is stopped":
                raise KeyboardInterrupt("by the user")
            if self.name == "fails":
                raise ValueError("first run")
            return y * mx.random.uniform(shape=y.shape)

    block, x = mt.checkpoint(Failing()), mx.ones((2, 4))
    expected = {name: id(array) for name, array in tree_flatten(block.parameters())}
    for name, kind, text in (
        ("fails", ValueError, "first run"),
        ("fails again", ValueError, "second run"),
        ("is stopped", KeyboardInterrupt, "by the user"),
    ):
        block.name = name
        with pytest.raises(kind, match=text):
            mx.grad(lambda x: block(x).sum())(x)
        assert {name: id(array) for name, array in tree_flatten(block.parameters())} == expected
        assert not mt.is_recomputing()
    block.name = "works"
    mx.random.seed(4)
    mx.eval(mx.grad(lambda x: block(x).sum())(x))
    stream = mx.random.state[0].tolist()
    mx.random.seed(4)
    mx.random.uniform(shape=(2, 4))
    assert mx.random.state[0].tolist() == stream


def test_a_block_that_does_something_else_the_second_time():
    sizes = iter([3, 4])
    block = mt.checkpoint(lambda x: mx.concatenate([x] * next(sizes)))
    with pytest.raises(mt.CheckpointError, match=r"float32\[4\].*float32\[3\]"):
        mx.grad(lambda x: block(x).sum())(mx.ones((1,)))


def test_a_step_that_was_compiled_before_its_block_was_wrapped_is_traced_anew():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def __call__(self, x):
            traced.append(1)
            return mx.tanh(self.layer(x))

    traced = []
    model = nn.Sequential(Counting(), nn.Linear(4, 4))
    gradient = nn.value_and_grad(model, lambda x: model(x).sum())
    step = mx.compile(lambda x: gradient(x), inputs=[model.state], outputs=[model.state])
    runs = {"plain": 1, "checkpointed": 2, "undone": 0, "checkpointed again": 0}
    for name, expected in runs.items():
        traced.clear()
        if name.startswith("checkpointed"):
            mt.checkpoint(model.layers[0])
        elif name == "undone":
            mt.uncheckpoint(model)
        mx.eval(step(mx.ones((2, 4))))
        assert len(traced) == expected, name


def test_what_makes_compiled_steps_look_again_is_no_parameter():
    block = nn.Linear(4, 4)
    before = dict(block)
    mt.checkpoint(block)
    assert set(block.parameters()) == set(before)
    assert set(block.trainable_parameters()) == set(before)
    mt.uncheckpoint(block)
    assert dict(block).keys() == before.keys()
