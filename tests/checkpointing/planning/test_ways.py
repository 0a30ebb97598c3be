"""Choices of blocks and loss: what they mean, and that plans take the loss as one more block."""

import json
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import pytest
from two_losses import BLOCKS, Machine, Training

from mlx_tune import InvalidArgumentError, is_checkpointed, plan_checkpoints
from mlx_tune.checkpointing.planning.ways import Ways
from mlx_tune.measuring.forecast import ESTIMATE_MARGIN

BATCH = 16


def ways(*, linear):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    return Ways(model, ("layers.0", "layers.1"), "plain step", "linear step" if linear else None)


def test_with_one_loss_a_choice_is_one_of_blocks():
    found = ways(linear=False)
    assert (found.none, found.all) == ((False, False), (True, True))
    assert found.with_loss(found.none, linear=True) == found.none
    assert found.chosen((False, True)) == ("layers.1",)
    assert (found.loss((True, True)), found.named((True, False))) == ("", "1 of 2 blocks checkpointed")


def test_with_two_losses_a_choice_ends_with_the_loss():
    found = ways(linear=True)
    assert (found.none, found.all) == ((False,) * 3, (True,) * 3)
    assert found.with_loss(found.none, linear=True) == (False, False, True)
    assert found.chosen((False, True, True)) == ("layers.1",)
    assert [found.loss((True, True, linear)) for linear in (False, True)] == ["plain", "linear"]
    assert found.named((True, False, True)) == "1 of 2 blocks checkpointed, linear loss"


@pytest.mark.parametrize("choice", list(product([False, True], repeat=3)))
def test_a_choice_is_applied_while_the_block_runs(choice):
    found = ways(linear=True)
    with found.applied(choice) as step:
        assert step == ("linear step" if choice[-1] else "plain step")
        assert tuple(map(is_checkpointed, found.model.layers)) == choice[:-1]
    assert not any(map(is_checkpointed, found.model.layers))


def plan(training, budget, **options):
    return training.searched(plan_checkpoints, budget, **{"batch_size": BATCH, **options})


@pytest.mark.cpu_only
@pytest.mark.parametrize("linear", [0.05, 0.15, 2.0], ids=["cheap", "dear", "very dear"])
def test_the_plan_is_the_fastest_of_all_choices_of_blocks_and_loss(monkeypatch, linear):
    training = Training()
    choices = list(product([False, True], repeat=BLOCKS + 1))
    floors = {choice: training.floor(choice, BATCH) for choice in choices}
    machine = Machine(monkeypatch, training, linear=linear)
    losses = set()
    for share in (0.0, 0.3, 0.6, 0.9, 1.5):
        least = min(floors.values())
        budget = int(1.1 * least + share * (max(floors.values()) - least))
        beside = training.beside()
        found = plan(training, budget)
        chosen = (*(block.checkpointed for block in found.blocks), found.loss == "linear")
        allowed = (budget + beside) / (1 + ESTIMATE_MARGIN) - beside
        best = min(machine.seconds(BATCH, choice) for choice in choices if floors[choice] <= allowed)
        assert found.peak_bytes <= found.budget_bytes
        assert found.measured_seconds == pytest.approx(machine.seconds(BATCH, chosen))
        assert found.measured_seconds <= best * 1.01
        losses.add(found.loss)
    assert losses == {"plain", "linear"}


@pytest.mark.parametrize("linear", [-0.3, 0.0, 0.009])
def test_a_linear_loss_that_is_no_slower_is_the_only_one(monkeypatch, linear):
    """And the plain one is not run any more."""
    training = Training()
    machine = Machine(monkeypatch, training, linear=linear)
    found = plan(training, 10**9)
    assert (found.loss, found.paths) == ("linear", ())
    assert f"took {1 + linear:.2f} times as long as with the plain one" in str(found)
    assert "0 of 3 blocks, linear loss" in str(found)
    last = max(i for i, (_, choice, _) in enumerate(machine.runs) if not choice[-1])
    assert all(choice[-1] for _, choice, _ in machine.runs[last + 1 :])
    assert last < 10


@pytest.mark.cpu_only
def test_where_the_plain_loss_never_fits_it_is_not_run(monkeypatch):
    training = Training()
    machine = Machine(monkeypatch, training)
    monkeypatch.setattr(training, "make_batch", lambda n: mx.zeros((n, 1024), dtype=mx.int32))
    plain, linear = (training.floor((*(True,) * BLOCKS, yes), 1) for yes in (False, True))
    assert linear < 0.6 * plain
    found = plan(training, int(0.9 * plain), batch_size=1)
    assert found.loss == "linear"
    assert all(choice[-1] for _, choice, _ in machine.runs)
    assert "with the plain one no step fits the budget with room to spare" in str(found)


@pytest.mark.cpu_only
def test_a_real_plan_says_which_loss_it_tried_and_changes_nothing():
    training = Training()
    before = training.everything()
    found = plan(training, int(1.3 * training.floor((False,) * BLOCKS + (True,), BATCH)))
    assert training.everything() == before
    assert found.loss in ("plain", "linear")
    assert found.peak_bytes <= found.budget_bytes
    assert {trial.loss for trial in found.trials} <= {"plain", "linear"}
    assert f"with the {found.trials[0].loss} loss: " in str(found)
    assert json.loads(json.dumps(found.to_dict()))["loss"] == found.loss


def test_a_linear_step_that_is_no_function_is_refused():
    training = Training()
    training.linear_step = "linear"
    with pytest.raises(InvalidArgumentError, match="linear_step='linear': it must be a function"):
        plan(training, 10**9)
