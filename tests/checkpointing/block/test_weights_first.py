"""The gradients of a block's weights come before the block below is run again, and none that nobody asked for."""

import gc
import json
import sys
import weakref
from collections import Counter
from contextlib import nullcontext

import keeping_up
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from weights_first import in_the_old_order

import mlx_tune as mt
from mlx_tune.checkpointing.block.weights_first import WeightsFirst
from mlx_tune.upstream import drawing, operations_in

WIDTH, WIDE, ROWS, BLOCKS = 16, 256, 512, 6


class Block(nn.Module):
    """A small MLP; with an adapter, nothing else of it is trained."""

    def __init__(self, adapted=False):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDE, bias=False), nn.Linear(WIDE, WIDTH, bias=False)
        if adapted:
            self.freeze()
            self.a, self.b = mx.random.normal((WIDE, 2)), mx.random.normal((2, WIDTH))

    def __call__(self, x, mask=None, positions=None, skipped=None):
        hidden = mx.sin(self.up(x))
        out = self.down(hidden) + ((hidden @ self.a) @ self.b if "a" in self else 0)
        if mask is not None:
            out = out * mask
        if positions is not None:
            out = out + positions
        return x + out if skipped is None else x + out + skipped


class Stack(nn.Module):
    def __init__(self, wrap, adapted=False, blocks=BLOCKS):
        super().__init__()
        self.layers = [wrap(Block(adapted)) for _ in range(blocks)]
        mx.eval(self.parameters())

    def __call__(self, x, *args):
        for layer in self.layers:
            x = layer(x, *args)
        return x


def tiled(block):
    return mt.tile(block, 128)


def normal(*shape):
    array = mx.random.normal(shape, key=mx.random.key(sum(shape)))
    mx.eval(array)
    return array


X, MASK, POSITIONS = normal(4, WIDTH), normal(4, 1), mx.array(list(range(WIDTH)))


def of_the_parameters(wrap=mt.checkpoint, adapted=False, *args):
    model = Stack(wrap, adapted, 3)
    return nn.value_and_grad(model, lambda x: model(x, *args).square().mean())(X)


def of_the_input():
    model = Stack(mt.checkpoint, blocks=3)
    return mx.grad(lambda x: model(x).square().mean())(X)


def of_the_input_and_the_parameters():
    model = Stack(mt.checkpoint, blocks=3)

    def loss(parameters, x):
        model.update(parameters)
        return model(x).square().mean()

    return mx.grad(loss, argnums=(0, 1))(model.trainable_parameters(), X)


def of_one_weight():
    """Though all are trained."""
    model = Stack(mt.checkpoint, blocks=3)

    def loss(weight):
        model.layers[1].down.weight = weight
        return model(X).square().mean()

    return mx.grad(loss)(model.layers[1].down.weight)


def of_two_inputs():
    model = Stack(mt.checkpoint, blocks=3)

    def loss(x, mask):
        return model(x, mask, POSITIONS, x).square().mean()

    return mx.grad(loss, argnums=(0, 1))(X, MASK)


def function():
    return mt.checkpoint(lambda x, w, v: x + mx.sin(x @ w) @ v)


def of_a_functions_arguments(argnums):
    block = function()

    def loss(x, w, v):
        return block(block(x, w, v), w, v).square().mean()

    return mx.grad(loss, argnums=argnums)(X, normal(WIDTH, WIDE), normal(WIDE, WIDTH))


def of_shared_weights():
    block = mt.checkpoint(Block())
    return nn.value_and_grad(block, lambda x: block(block(block(x))).square().mean())(X)


def of_blocks_in_blocks():
    model = nn.Sequential(*(mt.checkpoint(Stack(mt.checkpoint, blocks=2)) for _ in range(2)))
    return mx.grad(lambda x: model(x).square().mean())(X)


def of_gradients(argnums):
    """A derivative of a derivative."""
    block = function()

    def squared(x, w, v):
        gradients = mx.grad(lambda x, w: block(block(x, w, v), w, v).square().mean(), argnums=argnums)(x, w)
        return sum(gradient.square().sum() for gradient in gradients)

    return mx.grad(squared)(X, normal(WIDTH, WIDE), normal(WIDE, WIDTH))


def of_what_was_kept():
    kept = mt.checkpoint(lambda x, w, v: x + mt.keep(mx.sin(x @ w), "wide") @ v, keep=["wide"])
    return mx.grad(lambda x, w, v: kept(kept(x, w, v), w, v).square().mean(), argnums=(0, 1, 2))(
        X, normal(WIDTH, WIDE), normal(WIDE, WIDTH)
    )


CASES = {
    "parameters": of_the_parameters,
    "adapters": lambda: of_the_parameters(mt.checkpoint, True),
    "mask and positions": lambda: of_the_parameters(mt.checkpoint, False, MASK, POSITIONS),
    "parameters of tiles": lambda: of_the_parameters(lambda block: mt.tile(block, 2)),
    "adapters of tiles": lambda: of_the_parameters(lambda block: mt.tile(block, 2), True),
    "input": of_the_input,
    "input and parameters": of_the_input_and_the_parameters,
    "one weight": of_one_weight,
    "two inputs": of_two_inputs,
    "first argument": lambda: of_a_functions_arguments(0),
    "last argument": lambda: of_a_functions_arguments(2),
    "all arguments": lambda: of_a_functions_arguments((0, 1, 2)),
    "shared weights": of_shared_weights,
    "blocks in blocks": of_blocks_in_blocks,
    "the input's gradient": lambda: of_gradients((0,)),
    "two gradients": lambda: of_gradients((0, 1)),
    "what was kept": of_what_was_kept,
}
#: Operations that only say in which order others run.
ORDER = {"Depends", "CustomTransforms", "StopGradient"}


@pytest.mark.parametrize("name", CASES)
def test_the_same_is_computed_bit_for_bit_and_no_more(name):
    def found():
        mx.random.seed(0)
        arrays = [array for _, array in tree_flatten(CASES[name]()) if isinstance(array, mx.array)]
        computed = Counter(operation for operation, _, _ in operations_in(drawing(*arrays)) if operation not in ORDER)
        mx.eval(arrays)
        return computed, arrays

    computed, arrays = found()
    with in_the_old_order():
        before, expected = found()
    assert computed == before
    for array, same in zip(arrays, expected, strict=True):
        assert mx.array_equal(array, same)


def waiting(arrays):
    """How many gradients wait for how many others."""
    return [len(read) for operation, read, made in operations_in(drawing(*arrays)) if operation == "Depends"]


@pytest.mark.parametrize("adapted", [False, True])
def test_the_gradient_of_an_input_waits_for_the_weights_that_are_trained(adapted):
    def found():
        loss, gradients = of_the_parameters(mt.checkpoint, adapted)
        return Counter(waiting([loss, *(array for _, array in tree_flatten(gradients))]))

    more = found()
    with in_the_old_order():
        more.subtract(found())
    # Each of two blocks' input gradients waits for two weights'. Nobody asks for that of the first block.
    assert {reads: count for reads, count in more.items() if count} == {3: 2}


def test_vmap_is_as_it_was():
    block = mt.checkpoint(Block())
    x = normal(3, 4, WIDTH)
    assert mx.allclose(mx.vmap(block)(x), mx.stack([block(row) for row in x]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("evaluated", [False, True])
def test_calls_are_gone_when_their_graph_is(monkeypatch, compiled, evaluated):
    """MLX's graph leads from gradients to calls: were gradients held there, none of it would ever go."""
    alive = weakref.WeakSet()
    plain = WeightsFirst.__init__

    def noted(self, *args):
        alive.add(self)
        plain(self, *args)

    monkeypatch.setattr(WeightsFirst, "__init__", noted)

    def everything():
        model = Stack(mt.checkpoint, blocks=3)
        step = nn.value_and_grad(model, lambda x: model(x).square().mean())
        if compiled:
            step = mx.compile(step, inputs=model.state)
        found = step(X)
        assert alive
        if evaluated:
            mx.eval(found)

    everything()
    gc.collect()
    assert not alive


KINDS = {
    f"{name}, {'compiled' if compiled else 'eager'}": (wrap, adapted, compiled)
    for name, wrap, adapted in (
        ("all weights", mt.checkpoint, False),
        ("adapters", mt.checkpoint, True),
        ("all weights in pieces", tiled, False),
    )
    for compiled in (False, True)
}


def floors(kind):
    """The floor of a training step above what there was before, predicted and measured."""
    wrap, adapted, compiled = KINDS[kind]
    mx.random.seed(0)
    model, optimizer, x = Stack(wrap, adapted), optim.SGD(0.1), normal(ROWS, WIDTH)
    gradient = nn.value_and_grad(model, lambda model, x: model(x).square().mean())
    state = [model.state, optimizer.state]

    def update(x):
        loss, gradients = gradient(model, x)
        optimizer.update(model, gradients)
        return loss

    step = mx.compile(update, inputs=state, outputs=state) if compiled else update
    mx.eval(state, x)
    predicted = mt.estimate_memory(step, x, state=(model, optimizer))
    mx.eval(step(x), state)
    gc.collect()
    before = mx.get_active_memory()
    # The least of a few: on a busy machine the worker may fall behind for a moment, and then more is alive at once.
    measured = min(keeping_up.throttled_peak(lambda: mx.eval(step(x), state)) for _ in range(5))
    return predicted.floor_bytes - predicted.start_bytes, measured - before


@pytest.fixture(scope="module")
def found_floors():
    return {order: json.loads(keeping_up.in_own_process(__file__, order)) for order in ("new", "old")}


@pytest.mark.cpu_only
@pytest.mark.skipif(not keeping_up.CAN_KEEP_UP, reason="threads cannot choose their core here")
@pytest.mark.parametrize("kind", KINDS)
def test_one_blocks_activations_are_alive(kind, found_floors):
    new, old = found_floors["new"][kind], found_floors["old"][kind]
    for predicted, measured in (new, old):
        assert predicted == pytest.approx(measured, abs=600)
    assert new[1] < (0.75 if "adapters" in kind else 0.5) * old[1]


if __name__ == "__main__":
    keeping_up.keep_up()
    with in_the_old_order() if sys.argv[1] == "old" else nullcontext():
        print(json.dumps({kind: floors(kind) for kind in KINDS}))
