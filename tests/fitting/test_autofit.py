"""autofit on real graphs: with made-up times, whose fastest setting is known, and for real."""

import gc
import itertools
import json
import signal
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from two_losses import Machine as TwoLosses
from two_losses import Training as SpokenTraining

import mlx_tune.checkpointing.planning.measure as measuring
import mlx_tune.checkpointing.planning.survey as surveying
from mlx_tune import (
    BudgetError,
    InvalidArgumentError,
    MlxTuneError,
    checkpoint,
    estimate_memory,
    is_checkpointed,
    uncheckpoint,
)
from mlx_tune import autofit as autofit_with_progress
from mlx_tune.measuring.step import StepTrial

pytestmark = pytest.mark.usefixtures("quick_garbage")

autofit = partial(autofit_with_progress, progress=False)
WIDTH, BLOCKS = 16, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def __call__(self, x):
        return x + self.down(nn.relu(self.up(x)))


class Training:
    """A model, a step on token rows of 32, and the state that a step changes."""

    def __init__(self):
        mx.random.seed(0)
        self.model = nn.Sequential(nn.Embedding(50, WIDTH), *(Block() for _ in range(BLOCKS)))
        self.optimizer = optim.SGD(0.1)
        mx.eval(self.model.parameters())
        gradient = nn.value_and_grad(self.model, lambda model, x: model(x).square().mean())

        def step(x):
            loss, gradients = gradient(self.model, x)
            self.optimizer.update(self.model, gradients)
            return loss

        self.step = step

    @property
    def blocks(self):
        return self.model.layers[1:]

    @staticmethod
    def make_batch(n):
        return mx.zeros((n, 32), dtype=mx.int32)

    def floor(self, n, checkpointed):
        if checkpointed:
            list(map(checkpoint, self.blocks))
        try:
            return estimate_memory(self.step, self.make_batch(n), state=(self.model, self.optimizer)).floor_bytes
        finally:
            uncheckpoint(self.model)

    def everything(self):
        values = [(name, value.tolist()) for name, value in tree_flatten(self.model.parameters())]
        return values, mx.random.state[0].tolist(), [type(m) for m in self.model.modules()], sorted(self.model)

    def beside(self):
        gc.collect()
        return max(0, mx.get_active_memory() - sum(a.nbytes for _, a in tree_flatten(self.model.parameters())))

    def fit(self, budget, **options):
        return autofit(
            self.model, self.step, self.make_batch, budget=budget + self.beside(), state=self.optimizer, **options
        )


class Machine:
    """Steps of `fixed + n * (row + again * checkpointed blocks)` seconds, whose peak is their floor."""

    def __init__(self, monkeypatch, fixed, row, again):
        self.training, self.fixed, self.row, self.again = Training(), fixed, row, again
        self.runs = []
        monkeypatch.setattr(measuring, "run_step", self.run_step)
        monkeypatch.setattr(surveying, "forward_seconds", self.forward_seconds)

    def forward_seconds(self, path, block, calls):
        return calls.inputs[0][0][0].shape[0] * self.again

    def seconds(self, n, blocks):
        return self.fixed + n * (self.row + self.again * blocks)

    def run_step(self, step, args, state=(), limit_bytes=None):
        n, blocks = args[0].shape[0], sum(map(is_checkpointed, self.training.blocks))
        floor = estimate_memory(step, *args, state=state).floor_bytes + self.training.beside()
        self.runs.append((n, blocks, limit_bytes))
        return StepTrial(limit_bytes, floor, self.seconds(n, blocks))

    def largest(self, blocks, budget):
        """The largest batch whose floor leaves the margin of an estimate."""
        n = 1
        while self.training.floor(n + 1, blocks) * 1.03 <= budget:
            n += 1
        return n


def test_the_fit_is_as_fast_as_the_best_of_the_simple_settings(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.1, 0.01)
    budget = machine.training.floor(12, False)
    fit = machine.training.fit(budget)
    simple = [(machine.largest(False, budget), 0), (machine.largest(True, budget), BLOCKS), (4, 0)]
    best = max(n / machine.seconds(n, blocks) for n, blocks in simple)
    assert fit.measured_rate / 32 >= 0.99 * best
    assert fit.peak_bytes <= fit.budget_bytes
    assert fit.measured_seconds == pytest.approx(machine.seconds(fit.batch_size, len(fit.paths)))
    assert all(limit <= fit.budget_bytes for _, _, limit in machine.runs)
    names = [s.known_as for s in fit.trials if s.known_as]
    assert sorted(names) == [
        "largest with every block checkpointed",
        "largest without checkpoints",
        "mlx-lm's default batch",
    ]
    assert len(fit.frontier) >= 2
    for smaller, larger in itertools.pairwise(fit.frontier):
        assert smaller.floor_bytes <= larger.floor_bytes
        assert smaller.predicted_rate < larger.predicted_rate
    assert [s.batch_size for s in fit.trials if s.chosen] == [fit.batch_size]


def test_sizes_divide_the_target_and_multiply_to_it(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.0001)
    fit = machine.training.fit(machine.training.floor(12, False), target_batch=36, multiple_of=2)
    assert fit.batch_size % 2 == 0
    assert fit.batch_size * fit.accumulation_steps == 36
    assert all(36 % s.batch_size == 0 for s in fit.trials)


def test_no_batch_is_larger_than_asked_for(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.0001)
    fit = machine.training.fit(10**9, max_batch=6)
    assert fit.batch_size == 6
    assert max(n for n, _, _ in machine.runs) == 6


def test_without_throttling_the_limit_is_the_budget(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.01, 0.0001)
    budget = machine.training.floor(12, False)
    fit = machine.training.fit(budget, throttle=False)
    assert {limit for _, _, limit in machine.runs} == {fit.budget_bytes}
    assert fit.predicted_peak_bytes * 1.2 <= fit.budget_bytes * 1.01
    assert "throttle=False" in str(fit)


def test_checkpoints_can_be_left_as_they_are(monkeypatch):
    machine = Machine(monkeypatch, 1.0, 0.1, 0.0)
    list(map(checkpoint, machine.training.blocks))
    try:
        fit = machine.training.fit(10**6, checkpoint=False, max_batch=8)
    finally:
        assert uncheckpoint(machine.training.model) == BLOCKS
    assert {blocks for _, blocks, _ in machine.runs} == {BLOCKS}
    assert (fit.batch_size, fit.paths, fit.found) == (8, (), 0)
    assert "checkpoint=False" in str(fit)
    assert "blocks checkpointed" not in str(fit)


def test_a_model_without_repeated_blocks_gets_the_rest():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    gradient = nn.value_and_grad(model, lambda model, x: model(x).square().mean())
    fit = autofit(model, lambda x: gradient(model, x), lambda n: mx.ones((n, 8)), budget="1GB", max_batch=8)
    assert 4 <= fit.batch_size <= 8
    assert (fit.paths, fit.unit) == ((), "rows")
    assert "Nothing was checkpointed: Sequential has no repeated block." in str(fit)
    with fit.applied():
        pass


@pytest.mark.cpu_only
def test_with_memory_to_spare_the_faster_loss_is_taken_and_with_little_the_leaner_one(monkeypatch):
    """Fixed costs make larger batches faster, a row costs less than a block again, and the linear loss something."""
    training = SpokenTraining()
    machine = TwoLosses(monkeypatch, training, fixed=4.0, again=0.2, linear=0.1)
    roomy = training.searched(autofit, 10**9, max_batch=8)
    assert (roomy.loss, roomy.batch_size, roomy.paths) == ("plain", 8, ())
    assert {s.loss for s in roomy.trials} >= {"plain"}
    tight = training.searched(autofit, training.floor((False,) * BLOCKS + (False,), 6), max_batch=64)
    assert tight.loss == "linear"
    assert tight.batch_size > 8
    rates = {n / machine.seconds(n, choice) for n, choice, _ in machine.runs}
    assert tight.measured_rate / 64 >= 0.99 * max(n for n in rates if n <= tight.measured_rate / 64 + 1e-9)
    assert "linear loss, " in str(tight).splitlines()[0]
    assert any("largest with the linear loss alone" in s.known_as for s in tight.trials)
    assert json.loads(json.dumps(tight.to_dict()))["loss"] == "linear"


@pytest.mark.cpu_only
def test_without_blocks_to_choose_the_loss_still_is(monkeypatch):
    training = SpokenTraining()
    TwoLosses(monkeypatch, training, fixed=4.0, linear=0.1)
    fit = training.searched(autofit, training.floor((False,) * 4, 6), max_batch=64, checkpoint=False)
    assert (fit.loss, fit.paths, fit.found) == ("linear", (), 0)
    assert {s.loss for s in fit.trials} == {"plain", "linear"}


def test_a_linear_loss_that_is_no_slower_ends_the_search_among_losses(monkeypatch):
    training = SpokenTraining()
    TwoLosses(monkeypatch, training, fixed=4.0, linear=-0.2)
    fit = training.searched(autofit, 10**9, max_batch=8)
    assert fit.loss == "linear"
    assert {s.loss for s in fit.trials} == {"linear"}
    assert "which never holds all logits, was taken: timed in turns at batch size 2, a step took 0.9" in str(fit)


def test_a_real_fit_of_two_losses_changes_nothing():
    training = SpokenTraining()
    before = training.everything()
    fit = training.searched(autofit, training.floor((False,) * 4, 8), max_batch=16)
    assert training.everything() == before
    assert fit.loss in ("plain", "linear")
    assert fit.peak_bytes <= fit.budget_bytes


def test_the_smallest_batch_can_be_given(monkeypatch):
    machine = Machine(monkeypatch, 0.0, 0.1, 0.01)
    fit = machine.training.fit(10**6, min_batch=6, max_batch=9, multiple_of=3)
    assert {n for n, _, _ in machine.runs} == {6, 9}
    assert fit.batch_size == 6


def test_a_real_fit_changes_nothing_and_applies(tmp_path):
    training = Training()
    before = training.everything()
    fit = training.fit(training.floor(12, False), target_batch=8)
    assert training.everything() == before
    assert fit.unit == "tokens"
    assert fit.batch_size * fit.accumulation_steps == 8
    assert fit.peak_bytes <= fit.budget_bytes
    limit_before = mx.set_memory_limit(2**40)
    try:
        with fit.applied():
            wrapped = [p for p, m in training.model.named_modules() if is_checkpointed(m)]
            assert sorted(wrapped) == sorted(fit.paths)
            assert mx.set_memory_limit(fit.limit_bytes) == fit.limit_bytes
        assert mx.set_memory_limit(2**40) == 2**40
    finally:
        mx.set_memory_limit(limit_before)
    assert training.everything() == before
    assert json.loads(json.dumps(fit.to_dict(), allow_nan=False))["batch_size"] == fit.batch_size
    assert fit.search_seconds > 0
    assert str(fit).startswith("Chosen within ")
    fit.plot(tmp_path / "fit.svg")
    assert (tmp_path / "fit.svg").stat().st_size > 1000


def test_an_error_in_a_step_changes_nothing(monkeypatch):
    training = Training()
    before = training.everything()

    def breaks(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "run_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        training.fit(training.floor(12, False))
    assert training.everything() == before


@pytest.mark.parametrize("call", [1, 4, 6])
def test_ctrl_c_at_any_moment_changes_nothing(call):
    training, calls = Training(), []
    before = training.everything()

    def make_batch(n):
        calls.append(n)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return Training.make_batch(n)

    training.make_batch = make_batch
    with pytest.raises(KeyboardInterrupt):
        training.fit(200_000)
    assert training.everything() == before
    assert not any(map(is_checkpointed, training.blocks))


def test_a_budget_that_no_batch_fits_is_an_error(monkeypatch):
    monkeypatch.setattr(measuring, "run_step", lambda *args: pytest.fail("ran"))
    with pytest.raises(BudgetError, match=r"all 3 blocks checkpointed .* Not even batch size 1"):
        Training().fit(5000)


def test_without_blocks_the_error_speaks_of_none(monkeypatch):
    monkeypatch.setattr(measuring, "run_step", lambda *args: pytest.fail("ran"))
    with pytest.raises(BudgetError, match=r"does not fit [^:]*: it needs at least"):
        Training().fit(5000, checkpoint=False)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_batch": 0}, "target_batch=0"),
        ({"max_batch": 0}, "max_batch=0"),
        ({"min_batch": True}, "min_batch=True"),
        (
            {"target_batch": 9, "multiple_of": 2},
            "There is no multiple of multiple_of=2 that divides target_batch=9, at least min_batch=1.",
        ),
        ({"min_batch": 9, "max_batch": 8}, "min_batch=9 is above max_batch=8: no size lies between."),
        ({"checkpoint": False, "select": "layers.*"}, "checkpoint=False that none"),
        ({"select": "blocks.*"}, r"select='blocks.\*' selects no module"),
        ({"tolerance": 1.5}, "tolerance=1.5"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_contradictions_are_refused(options, text):
    with pytest.raises(MlxTuneError, match=text):
        Training().fit(10**9, **options)


@pytest.mark.parametrize(("step", "make_batch"), [(None, len), (abs, "batches")])
def test_what_is_no_function_is_refused(step, make_batch):
    with pytest.raises(InvalidArgumentError, match=r"step=.*make_batch=.*: both must be functions"):
        autofit(Training().model, step, make_batch, budget="1GB")
