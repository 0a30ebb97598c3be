"""The canary: the same rows must give the same loss at batch 1 and at batch n."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import small_steps

from mlx_tune.batching.canary import check_loss
from mlx_tune.errors import TrialError
from mlx_tune.state import Snapshot


def run(step, make_batch, state, size=3):
    with Snapshot(state, spill=True) as before:
        return check_loss(step, make_batch, state, size, 1 << 34, before.restore)


def test_a_healthy_step_sings_though_it_has_dropout():
    step, make_batch, state = small_steps.build(dropout=0.5)
    assert run(step, make_batch, state) is None
    assert state[0].training


def test_a_sum_over_rows_is_as_good_as_a_mean():
    step, make_batch, state = small_steps.build()
    assert run(lambda x: step(x) * x.shape[0], make_batch, state) is None


def test_zeros_are_heard():
    step, make_batch, state = small_steps.build()
    wrong = run(lambda x: step(x) * (x.shape[0] == 1), make_batch, state)
    assert wrong.startswith("the canary's loss is 0 at this size and ")


def test_a_random_loss_proves_nothing_and_says_so():
    model = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.5))
    held = [model.state, mx.random.state]
    step = mx.compile(lambda x: model(x).square().mean(), inputs=held, outputs=held)
    mx.eval(step(small_steps.make_batch(1)))  # compiled in training mode
    with pytest.raises(TrialError, match=r"differs from run to run.*Pass the step without mx\.compile"):
        run(step, small_steps.make_batch, model)


def test_rows_must_come_first():
    step, make_batch, state = small_steps.build()
    with pytest.raises(TrialError, match=r"has shape \[100, 1, 64\] and does not begin with an axis of one row"):
        run(lambda x: step(x.transpose(1, 0, 2)), lambda n: make_batch(n).transpose(1, 0, 2), state)
