import re

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import small_steps

import mlx_tune as mt
import mlx_tune.devices
from mlx_tune.batching import autobatch
from mlx_tune.errors import BudgetError

OPTIONS = {"progress": False}


def test_a_batch_that_cannot_fit_is_not_tried_and_the_error_says_by_how_much():
    others = mx.get_active_memory()
    step, make_batch, state = small_steps.build()
    ran = []

    def watched(x):
        ran.append(x.shape)
        return step(x)

    pattern = (
        r"Batch size 50 does not fit: a step is predicted to take at least [\d.]+ MB, "
        r"[\d.]+ MB more than the budget of [\d.]+ MB \(given\)\. [\d.]+ MB of it are activations.*checkpoint_blocks"
    )
    with mt.track_memory() as memory, pytest.raises(BudgetError, match=pattern) as caught:
        autobatch(watched, make_batch, budget=others + 2_000_000, min_batch=50, state=state, **OPTIONS)
    assert memory.peak_bytes < others + 10_000_000
    assert caught.value.needed_bytes > others + 20_000_000
    assert caught.value.budget_bytes == others + 2_000_000


class Stack(nn.Module):
    """Blocks that keep more than they return."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Sequential(nn.Linear(32, 512), nn.GELU(), nn.Linear(512, 32)) for _ in range(4)]

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("budget", [20_000_000, 10_000_000])
def test_the_error_says_what_checkpointing_would_save(budget):
    mx.random.seed(0)
    others = mx.get_active_memory()
    model, optimizer = Stack(), optim.SGD(0.01)
    mx.eval(model.parameters())
    step = small_steps.training_step(model, optimizer, lambda model, x: model(x).square().mean())

    def make_batch(n):
        return mx.ones((n, 600, 32))

    pattern = (
        r"activations kept for the backward pass\. With mlx_tune\.checkpoint_blocks\(model\) the step is predicted to "
        r"take ([\d.]+) MB, ([\d.]+) MB less, (which fits|still [\d.]+ MB too much: shorten the rows as well)\.$"
    )
    with pytest.raises(BudgetError, match=pattern) as caught:
        autobatch(step, make_batch, budget=others + budget, state=(model, optimizer), **OPTIONS)
    assert not any(mt.is_checkpointed(module) for module in model.modules())
    needed, less, verdict = re.search(pattern, str(caught.value)).groups()
    with mt.checkpoint_blocks(model):
        predicted = mt.estimate_memory(step, make_batch(1), state=(model, optimizer)).floor_bytes
    assert verdict.startswith("which" if predicted <= budget else "still")
    assert float(needed) == pytest.approx((others + predicted) / 1e6, rel=0.01)
    assert float(needed) + float(less) == pytest.approx(caught.value.needed_bytes / 1e6, rel=0.02)


def test_a_budget_below_the_model_says_the_sizes():
    step, make_batch, state = small_steps.build()
    with pytest.raises(
        BudgetError,
        match=r"budget of 100 kB \(given\) is used up before the first step: .* hold .*, and .* take 136 kB",
    ):
        autobatch(step, make_batch, budget="100kB", state=state, **OPTIONS)
