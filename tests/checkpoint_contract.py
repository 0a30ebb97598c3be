"""A training step with and without checkpointing, and everything the contract says must be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

import mlx_tune as mt

Loss = Callable[..., mx.array]


@dataclass
class Outcome:
    """What two steps of training left: every array under a name, and how often the blocks ran."""

    arrays: dict[str, mx.array]
    calls: int


class CallCounter:
    """Counts the calls of some classes' `__call__`."""

    def __init__(self, patch: pytest.MonkeyPatch, classes: Iterable[type]) -> None:
        self.calls = 0
        for kind in classes:
            patch.setattr(kind, "__call__", self._counted(kind.__call__))

    def _counted(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return plain(module, *args, **kwargs)

        return call


def train(
    make: Callable[[], nn.Module],
    loss: Loss,
    *args: Any,
    wrap: Callable[[nn.Module], Any] = lambda model: None,
    compiled: bool = False,
    flat: bool = False,
    with_model: bool = False,
    steps: int = 2,
    count: Iterable[type] = (),
) -> Outcome:
    """Two steps of SGD from the same weights and draws.

    Args:
        make: Builds the model.
        loss: Takes the model and `args`.
        args: The batch.
        wrap: What is done to the model before training.
        compiled: Compile the step, with model, optimizer and random stream as its state.
        flat: Take gradients with `mx.value_and_grad` of a function of the parameters.
        with_model: Pass the model to what is differentiated, as in `nn.value_and_grad(model, loss)(model, batch)`.
        steps: How many steps.
        count: The classes whose calls are counted.
    """
    mx.random.seed(0)
    model = make()
    mx.eval(model.parameters())
    wrap(model)
    optimizer = optim.SGD(learning_rate=0.05)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    first = () if with_model else (model,)
    if flat:

        def of_parameters(parameters: Any, *batch: Any) -> mx.array:
            model.update(parameters)
            return loss(*first, *batch)

        with_gradient = mx.value_and_grad(of_parameters)
    else:
        with_gradient = nn.value_and_grad(model, lambda *batch: loss(*first, *batch))

    def step(*batch: Any) -> Any:
        if with_model:
            batch = (model, *batch)
        value, gradient = with_gradient(model.trainable_parameters(), *batch) if flat else with_gradient(*batch)
        optimizer.update(model, gradient)
        return value, gradient

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    arrays: dict[str, mx.array] = {}
    with pytest.MonkeyPatch.context() as patch:
        counter = CallCounter(patch, count)
        mx.random.seed(7)
        for i in range(steps):
            value, gradient = step(*args)
            mx.eval(value, gradient, state)
            arrays[f"step {i} loss"] = value
            arrays.update({f"step {i} gradient {path}": array for path, array in tree_flatten(gradient)})
    arrays.update({f"after {path}": array for path, array in tree_flatten(model.parameters())})
    arrays["random stream"] = mx.random.state[0]
    return Outcome(arrays, counter.calls)


def apart(x: mx.array) -> mx.array:
    """The same values, by way of operations that `mx.compile` does not fuse with others.

    On a CPU each new combination of fused operations costs half a second of g++. Operations that are kept apart from
    their neighbours are the same ones in every block.
    """
    return x.flatten().reshape(x.shape)


def assert_same(plain: Outcome, checked: Outcome, relative: float = 0.0) -> None:
    """Every array the same: bit for bit, or within `relative` of its largest entry."""
    assert plain.arrays.keys() == checked.arrays.keys()
    for name, expected in plain.arrays.items():
        found = checked.arrays[name]
        if mx.array_equal(expected, found):
            continue
        difference = mx.abs(expected - found).max().item()
        allowed = relative * mx.abs(expected).max().item()
        assert difference <= allowed, f"{name}: {difference} apart, {allowed} allowed"


def bare_checkpoint(block: nn.Module) -> nn.Module:
    """What mlx-lm's `grad_checkpoint` does to a class, done to one instance: for comparison."""
    plain = type(block)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        def inner(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            self.update(parameters)
            return plain.__call__(self, *args, **kwargs)

        return mx.checkpoint(inner)(self.trainable_parameters(), *args, **kwargs)

    block.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    return block


def wrap_all(kind: type) -> Callable[[nn.Module], None]:
    """Checkpoint every module of a class."""

    def wrap(model: nn.Module) -> None:
        for module in model.modules():
            if type(module) is kind:
                mt.checkpoint(module)

    return wrap


def wrap_bare(kind: type) -> Callable[[nn.Module], None]:
    """The same with `bare_checkpoint`."""

    def wrap(model: nn.Module) -> None:
        for module in model.modules():
            if type(module) is kind:
                bare_checkpoint(module)

    return wrap
