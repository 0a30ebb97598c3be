"""Plans for small models: real ones, and ones on a made-up machine whose best choice can be tried out."""

import gc
from collections import Counter
from itertools import product
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from planned_training import Model, Training, between, plan_checkpoints

import mlx_tune.checkpointing.planning.measure as measuring
import mlx_tune.checkpointing.planning.plan as planning
import mlx_tune.checkpointing.planning.survey as surveying
from mlx_tune import BudgetError, CheckpointError, InvalidArgumentError, TraceError, checkpoint, is_checkpointed
from mlx_tune.graphs import estimate_memory
from mlx_tune.measuring.step import StepTrial, run_step


def test_nothing_is_checkpointed_where_everything_fits():
    training = Training()
    before = training.everything()
    plan = training.plan(10**9)
    assert training.everything() == before
    assert plan.paths == ()
    assert plan.peak_bytes <= plan.budget_bytes
    assert len(plan.blocks) == 5
    assert all(b.saved_bytes > 0 and b.extra_seconds > 0 for b in plan.blocks[:-1])


@pytest.mark.cpu_only
def test_a_tight_budget_is_kept_by_the_planned_step(floors):
    training = Training()
    before = training.everything()
    plan = training.plan(between(floors, 0.5))
    assert training.everything() == before
    assert 0 < len(plan.paths) < 6
    assert plan.predicted_peak_bytes <= plan.peak_bytes * 1.03
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.limit_bytes <= plan.budget_bytes
    with plan.applied():
        peak = min(run_step(training.step, [training.make_batch(256)], training.state).peak_bytes for _ in range(3))
    assert peak <= plan.budget_bytes
    assert not any(map(is_checkpointed, training.model.modules()))


@pytest.mark.cpu_only
def test_a_compiled_step_is_traced_anew_where_the_plan_changes():
    training = Training(Model((128,) * 3), compiled=True)
    batch = training.make_batch(256)
    mx.eval(training.step(batch), training.model.parameters())
    plan = training.plan(between((training.floor([False] * 3), training.floor([True] * 3)), 0.4))
    assert plan.peak_bytes <= plan.budget_bytes

    def peak():
        return min(run_step(training.step, [batch], training.state, 1).peak_bytes for _ in range(3))

    plain = peak()
    with plan.apply():
        planned = peak()
    assert planned < 0.9 * plain
    training.traces = 0
    assert peak() > (plain + planned) / 2
    with plan.apply():
        assert peak() < (plain + planned) / 2
    assert training.traces == 0  # both traces are kept


def test_a_budget_below_the_floor_names_it_and_the_batch_that_would_fit(floors, monkeypatch):
    training = Training()
    monkeypatch.setattr(measuring, "run_step", lambda *args: pytest.fail("ran"))
    gc.collect()
    before, active = training.everything(), mx.get_active_memory()
    budget = int(0.7 * floors[1])
    with pytest.raises(
        BudgetError, match=r"all 5 blocks checkpointed it still needs at least .* Batch size \d+"
    ) as error:
        training.plan(budget)
    assert training.everything() == before
    assert mx.get_active_memory() == pytest.approx(active, abs=50_000)
    assert error.value.needed_bytes == pytest.approx(floors[1] + training.beside(), rel=0.01)
    n = int(str(error.value).split("Batch size ")[1].split()[0])
    allowed = (budget + training.beside()) / 1.03 - training.beside()
    assert training.floor([True] * 5, n) <= allowed * 1.01
    assert training.floor([True] * 5, n + 2) >= allowed * 0.99


def test_a_budget_that_no_batch_fits():
    with pytest.raises(BudgetError, match="Not even batch size 1 would"):
        Training().plan(1000)


class Machine:
    """Steps that take a second, and more for each checkpointed block; their peak is their floor and a little."""

    def __init__(self, training, seconds):
        self.training, self.seconds, self.beside = training, seconds, 0
        self.choices = list(product([False, True], repeat=len(seconds)))
        self.floors = {choice: training.floor(choice) for choice in self.choices}

    def estimate_memory(self, step, batch, state):
        """What is known already; the choice of none is traced, since the blocks are seen to run then."""
        choice = tuple(map(is_checkpointed, self.training.model.layers))
        return (
            SimpleNamespace(floor_bytes=self.floors[choice])
            if any(choice)
            else estimate_memory(step, batch, state=state)
        )

    def cost(self, choice):
        return sum(s for s, yes in zip(self.seconds, choice, strict=True) if yes)

    def forward_seconds(self, path, block, calls):
        return next(s for layer, s in zip(self.training.model.layers, self.seconds, strict=True) if layer is block)

    def run_step(self, step, args, state=(), limit_bytes=None):
        choice = tuple(map(is_checkpointed, self.training.model.layers))
        peak = self.floors[choice] + self.beside
        return StepTrial(limit_bytes, max(peak, min(limit_bytes, peak + 1000)), 1.0 + self.cost(choice))


@pytest.mark.parametrize(
    ("hidden", "seconds"),
    [
        ((128,) * 4, (0.1,) * 4),
        ((128, 64, 128, 64), (0.1, 0.02, 0.1, 0.02)),
        ((64, 128, 64, 128), (0.02, 0.3, 0.02, 0.3)),
    ],
)
def test_the_plan_is_the_fastest_of_all_choices_on_a_made_up_machine(monkeypatch, hidden, seconds):
    training = Training(Model(hidden))
    machine = Machine(training, seconds)
    monkeypatch.setattr(measuring, "run_step", machine.run_step)
    monkeypatch.setattr(surveying, "forward_seconds", machine.forward_seconds)
    monkeypatch.setattr(surveying, "estimate_memory", machine.estimate_memory)
    for share in (0.2, 0.5, 0.8):
        budget = between((machine.floors[(False,) * 4], min(machine.floors.values())), share)
        machine.beside = training.beside()
        plan = training.plan(budget)
        found = tuple(block.checkpointed for block in plan.blocks)
        allowed = (budget + machine.beside) / (1 + planning.ESTIMATE_MARGIN) - machine.beside
        best = min(machine.cost(choice) for choice in machine.choices if machine.floors[choice] <= allowed)
        assert machine.floors[found] <= budget
        assert plan.measured_seconds == pytest.approx(1 + machine.cost(found))
        assert machine.cost(found) <= best + 1e-9
        if len(plan.trials) > 1:
            assert plan.predicted_seconds == pytest.approx(plan.measured_seconds)


def test_an_optimizer_that_has_not_run_yet_is_planned_for_with_its_state():
    needed = []
    for initialized in (True, False):
        training = Training()
        if not initialized:
            training.optimizer = optim.Adam(1e-3)
        before = training.everything()
        with pytest.raises(BudgetError) as error:
            training.plan(10_000)
        assert training.everything() == before
        assert training.optimizer._initialized == initialized
        needed.append(error.value.needed_bytes - training.beside())
    assert needed[0] == pytest.approx(needed[1], rel=0.01)


def test_select_restricts_the_plan():
    plan = Training().plan(10**9, select="layers.[12]")
    assert [b.path for b in plan.blocks] == ["layers.1", "layers.2"]


def test_a_step_that_raises_while_measured_changes_nothing(floors, monkeypatch):
    training = Training()
    before = training.everything()
    count = 0

    def breaks(*args, **options):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return run_step(*args, **options)

    monkeypatch.setattr(measuring, "run_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        training.plan(between(floors, 0.5))
    assert training.everything() == before


def test_a_peak_that_leaves_the_budget_late_is_held_by_a_lower_limit(floors, monkeypatch):
    """The second time that a choice runs under a limit its peak is higher, as it happens by chance."""
    training = Training()
    seen = Counter()

    def noisy(step, args, state, limit):
        choice = tuple(map(is_checkpointed, training.model.layers))
        seen[choice, limit] += 1
        return StepTrial(limit, round(limit * (1.05 if seen[choice, limit] <= 3 else 1.3)), 1.0)

    monkeypatch.setattr(measuring, "run_step", noisy)
    plan = training.plan(between(floors, 0.5))
    assert plan.peak_bytes <= plan.budget_bytes
    assert plan.limit_bytes < plan.budget_bytes / 1.3 * 1.02


def test_a_step_whose_peak_no_limit_holds_is_an_error_with_both_figures(floors, monkeypatch):
    training = Training()
    before = training.everything()
    monkeypatch.setattr(measuring, "run_step", lambda step, args, state, limit: StepTrial(limit, 10**8, 1.0))
    with pytest.raises(BudgetError, match=r"predicted to need at least .* and its peak was 100 MB .* budget") as error:
        training.plan(between(floors, 0.5))
    assert error.value.needed_bytes == 10**8
    assert training.everything() == before


def test_a_checkpointed_block_is_refused():
    training = Training()
    checkpoint(training.model.layers[2])
    with pytest.raises(CheckpointError, match=r"first is 'layers.2'.*uncheckpoint\(model\)"):
        training.plan(10**9)


def test_a_resting_model_is_refused():
    training = Training()
    training.model.eval()
    with pytest.raises(CheckpointError, match=r"'layers.0' is in evaluation mode.*model.train\(\)"):
        training.plan(10**9)


def test_a_block_that_the_step_does_not_call_is_refused():
    training, other = Training(), Training()
    before = other.everything()
    with pytest.raises(CheckpointError, match=r"does not call 'layers.0' \(5 of 5 blocks"):
        plan_checkpoints(
            other.model,
            training.step,
            training.make_batch,
            batch_size=4,
            budget="1GB",
            state=training.state,
        )
    assert other.everything() == before


def test_a_step_that_evaluates_is_refused():
    training = Training()
    before = training.everything()

    def evaluates(x):
        loss = training.step(x)
        mx.eval(loss)
        return loss

    with pytest.raises(TraceError):
        plan_checkpoints(
            training.model, evaluates, training.make_batch, batch_size=4, budget="1GB", state=training.optimizer
        )
    assert training.everything() == before


@pytest.mark.parametrize(
    ("options", "text"), [({"n": 0}, "batch_size=0"), ({"n": 2.5}, r"batch_size=2\.5"), ({"steps": 0}, "steps=0")]
)
def test_bad_numbers_are_refused(options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        Training().plan(10**9, **options)
