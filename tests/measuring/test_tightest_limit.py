"""The search for the tightest limit: on made-up machines, whose answer is known, and on a real step."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

import mlx_tune.measuring.tightest_limit as limits
from mlx_tune.errors import InvalidArgumentError, TrialError
from mlx_tune.measuring.step import StepTrial
from mlx_tune.measuring.tightest_limit import tightest_limit


class Machine:
    """Steps that hold 1 GB free, 600 MB at least, and slow down below a knee: far more than tests hold besides."""

    def __init__(self, knee, slow=3.0):
        self.knee, self.slow, self.steps = knee, slow, 0

    def run_step(self, step, args, state=(), limit_bytes=None):
        self.steps += 1
        drift = 1 + 0.3 * (self.steps % 7) / 7  # a busy machine: the same for the two steps of a turn, nearly
        if limit_bytes is None:
            return StepTrial(None, 10**9, drift)
        slowed = self.slow if limit_bytes < self.knee else 1.0
        return StepTrial(limit_bytes, max(600_000_000, min(10**9, int(1.05 * limit_bytes))), drift * slowed)


@pytest.mark.parametrize("knee", [650_000_000, 800_000_000, 985_000_000])
def test_finds_the_knee_of_a_made_up_machine(monkeypatch, knee):
    machine = Machine(knee)
    monkeypatch.setattr(limits, "run_step", machine.run_step)
    best = tightest_limit(lambda: None, slowdown=0.5, progress=False)
    assert knee <= best.limit_bytes <= knee + 10_000_000
    assert best.peak_bytes == min(10**9, int(1.05 * best.limit_bytes))
    assert best.free_peak_bytes == 10**9
    assert all(t.fits == (t.limit_bytes >= knee) for t in best.trials)


def test_a_machine_on_which_every_limit_is_too_slow(monkeypatch):
    monkeypatch.setattr(limits, "run_step", Machine(10**10).run_step)
    best = tightest_limit(lambda: None, slowdown=0.5, progress=False)
    assert best.limit_bytes == best.free_peak_bytes == 10**9
    assert "Each lower limit that was tried was too slow" in str(best)


def test_the_table_and_the_dictionary_hold_every_trial(monkeypatch):
    monkeypatch.setattr(limits, "run_step", Machine(800_000_000).run_step)
    best = tightest_limit(lambda: None, slowdown=0.5, progress=False)
    lines = str(best).splitlines()
    assert lines[0].startswith("Tightest memory limit under which steps take at most 50.0 % longer: ")
    assert sum("too slow" in line for line in lines) == sum(not t.fits for t in best.trials) > 0
    assert [line for line in lines if line.endswith("chosen")]
    as_dict = best.to_dict()
    assert as_dict["limit_bytes"] == best.limit_bytes
    assert [t["limit_bytes"] for t in as_dict["trials"]] == [t.limit_bytes for t in best.trials]


@pytest.fixture
def training():
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.1), nn.Linear(64, 32))
    optimizer = optim.Adam(1e-3)
    optimizer.init(model.trainable_parameters())
    mx.eval(model.parameters(), optimizer.state)

    def step(x):
        loss, gradients = nn.value_and_grad(model, lambda model, x: model(x).square().mean())(model, x)
        optimizer.update(model, gradients)
        return loss

    return model, optimizer, step


def everything(model, optimizer):
    flat = tree_flatten(model.parameters()) + tree_flatten(optimizer.state) + [("key", mx.random.state[0])]
    return {f"{i} {name}": value.tolist() for i, (name, value) in enumerate(flat)}


def test_a_real_step_is_measured_and_leaves_everything_as_it_was(training):
    model, optimizer, step = training
    before = everything(model, optimizer)
    limit_before = mx.set_memory_limit(2**40)
    try:
        best = tightest_limit(step, mx.ones((64, 32)), state=(model, optimizer), slowdown=10.0, progress=False)
        assert mx.set_memory_limit(2**40) == 2**40
    finally:
        mx.set_memory_limit(limit_before)
    assert everything(model, optimizer) == before
    assert 0 < best.resident_bytes < best.limit_bytes <= best.free_peak_bytes
    assert best.peak_bytes <= best.free_peak_bytes
    with best.applied() as limit:
        assert limit.limit_bytes == best.limit_bytes


def test_a_step_that_raises_leaves_everything_as_it_was(training):
    model, optimizer, step = training
    before = everything(model, optimizer)
    count = 0

    def breaks(x):
        nonlocal count
        count += 1
        if count == 4:
            raise RuntimeError("the user's own")
        return step(x)

    with pytest.raises(RuntimeError, match="the user's own"):
        tightest_limit(breaks, mx.ones((64, 32)), state=(model, optimizer), progress=False)
    assert everything(model, optimizer) == before


def test_a_step_without_arrays_is_an_error():
    with pytest.raises(TrialError, match="step returned None: it must return arrays, the loss first"):
        tightest_limit(lambda: None, progress=False)


@pytest.mark.parametrize(("options", "text"), [({"slowdown": -0.1}, "slowdown=-0.1"), ({"repeats": 0}, "repeats=0")])
def test_bad_arguments_are_refused_before_anything_runs(options, text):
    with pytest.raises(InvalidArgumentError, match=text):
        tightest_limit(lambda: pytest.fail("ran"), progress=False, **options)
