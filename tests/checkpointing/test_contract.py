"""Each case of the contract: a model with its blocks checkpointed trains exactly as the plain one does."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoint_cases import CASES, DropoutBlock, Stack, batch, square
from checkpoint_contract import assert_same, wrap_all


@pytest.mark.cpu_only
@pytest.mark.parametrize("flat", [False, True], ids=["nn.value_and_grad", "mx.value_and_grad"])
@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        pytest.param(name, compiled, id=f"{name}-{'compiled' if compiled else 'eager'}")
        for name, case in CASES.items()
        for compiled in case.compiled
    ],
)
def test_trains_as_the_plain_model_does(name, compiled, flat):
    case = CASES[name]
    plain = case.train(compiled=compiled, flat=flat)
    checked = case.train(compiled=compiled, flat=flat, wrap=wrap_all(case.kind))
    assert plain.calls == case.calls * (1 if compiled else 2)
    assert checked.calls == 2 * plain.calls + case.extra
    assert_same(plain, checked, case.relative)


def test_mask_is_the_same_in_both_runs():
    """As if the mask were applied by hand: where the value is cut off, the gradient is."""
    from mlx_tune import checkpoint

    @checkpoint
    def block(x):
        return x * mx.random.bernoulli(0.5, x.shape)

    mx.random.seed(3)
    x = mx.ones((200,))
    value, gradient = mx.value_and_grad(lambda x: (block(x) * mx.arange(200)).sum())(x)
    mx.random.seed(3)
    mask = mx.random.bernoulli(0.5, (200,))
    assert mx.array_equal(gradient, mask * mx.arange(200))
    assert value.item() == (mask * mx.arange(200)).sum().item()


def test_steps_draw_differently_and_seeds_repeat():
    model = Stack(DropoutBlock)
    wrap_all(DropoutBlock)(model)
    x = batch()[0]
    gradient = nn.value_and_grad(model, lambda x: square(model, x))
    losses = []
    for seed in (1, None, 1):
        if seed is not None:
            mx.random.seed(seed)
        losses.append(gradient(x)[0].item())
    assert losses[0] == losses[2] != losses[1]
