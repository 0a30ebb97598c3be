"""The promises of docs/contributing.md, each on the public functions that could break it."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

import mlx_tune as mt


class Block(nn.Module):
    """Two layers with dropout between them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128)
        self.dropout = nn.Dropout(0.1)

    def __call__(self, x):
        return x + self.down(self.dropout(nn.relu(self.up(x))))


class Model(nn.Module):
    """A stack of blocks."""

    def __init__(self):
        super().__init__()
        self.layers = [Block() for _ in range(3)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Job:
    """A model in training, and everything about it that a call could change."""

    def __init__(self):
        mx.random.seed(7)
        self.model, self.optimizer = Model(), optim.AdamW(1e-3)
        self.optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.gradients_of = nn.value_and_grad(self.model, lambda model, x: model(x).square().mean())
        self.sizes = []

    @property
    def state(self):
        return self.model, self.optimizer

    def step(self, x):
        self.sizes.append(x.shape[0])
        loss, gradients = self.gradients_of(self.model, x)
        self.optimizer.update(self.model, gradients)
        return loss

    def broken_step(self, x):
        mx.eval(self.step(x), self.model.state, self.optimizer.state)
        raise KeyError("the user's own mistake")

    def broken_loss(self, x):
        mx.eval(self.model(x))
        raise KeyError("the user's own mistake")

    @staticmethod
    def make_batch(n):
        return mx.ones((n, 16, 128))

    def everything(self):
        """Values of arrays, flags, classes, limits and the random stream, comparable with ==."""
        arrays = {
            **{f"model.{k}": v for k, v in tree_flatten(self.model.parameters())},
            **{f"optimizer.{k}": v for k, v in tree_flatten(self.optimizer.state)},
            "random": mx.random.state[0],
        }
        previous = mx.set_memory_limit(10**12)
        mx.set_memory_limit(previous)
        return (
            {k: v.tolist() for k, v in arrays.items()},
            [type(m).__name__ for _, m in self.model.named_modules()],
            [m.training for _, m in self.model.named_modules()],
            previous,
        )


def not_finite(job):
    broken = copy.deepcopy(job.model.layers[1].up.weight)
    broken[3, 5] = float("nan")
    job.model.layers[1].up.weight = broken


FAILING = {
    "autobatch, a step that raises": lambda job: mt.autobatch(
        job.broken_step, job.make_batch, budget="200MB", state=job.state, progress=False
    ),
    "autobatch, nothing fits": lambda job: mt.autobatch(
        job.step, job.make_batch, budget=200_000, state=job.state, progress=False
    ),
    "autobatch, min above max": lambda job: mt.autobatch(
        job.step, job.make_batch, budget="200MB", min_batch=8, max_batch=4, state=job.state, progress=False
    ),
    "estimate_memory, a step that raises": lambda job: mt.estimate_memory(
        job.broken_step, job.make_batch(2), state=job.state
    ),
    "tightest_limit, a step that raises": lambda job: mt.tightest_limit(
        job.broken_step, job.make_batch(2), state=job.state, progress=False
    ),
    "plan_checkpoints, no such budget": lambda job: mt.plan_checkpoints(
        job.model, job.step, job.make_batch, batch_size=2, budget=200_000, state=job.state
    ),
    "checkpoint_blocks, nothing selected": lambda job: mt.checkpoint_blocks(job.model, select="no.such.*"),
    "checkpoint, not a block": lambda job: mt.checkpoint(3),
    "verify_checkpoint, a loss that raises": lambda job: mt.verify_checkpoint(
        job.model, job.broken_loss, job.make_batch(2)
    ),
    "quantize_model, swapped arguments": lambda job: mt.quantize_model(job.model, 64, 4, progress=False),
    "quantize_model, an evaluation that fails": lambda job: mt.quantize_model(
        job.model, 4, 64, evaluation=[mx.ones((2, 3, 127))], progress=False
    ),
    "autofit, a step that raises": lambda job: mt.autofit(
        job.model, job.broken_step, job.make_batch, budget="200MB", state=job.state
    ),
    "wired_limit, not a size": lambda job: mt.wired_limit("lots").__enter__(),
    "memory_limit, not a size": lambda job: mt.memory_limit("lots").__enter__(),
}


@pytest.mark.parametrize("name", FAILING)
def test_1_a_call_that_fails_leaves_everything_as_it_was(name):
    job = Job()
    before = job.everything()
    with pytest.raises(Exception):  # noqa: B017, PT011 - which error it is stands in each room's own tests
        FAILING[name](job)
    assert job.everything() == before
    loss = job.step(job.make_batch(2))
    mx.eval(loss, job.model.state, job.optimizer.state)
    assert mx.isfinite(loss).item(), "and the step still works"


def test_1_weights_that_are_not_finite_stop_quantization_before_it_starts():
    job = Job()
    not_finite(job)
    kinds = [type(m) for _, m in job.model.named_modules()]
    with pytest.raises(mt.QuantizationError, match=r"layers\.1\.up"):
        mt.quantize_model(job.model, 4, 64, progress=False)
    assert [type(m) for _, m in job.model.named_modules()] == kinds


def test_2_no_size_is_tried_that_is_predicted_not_to_fit():
    job = Job()
    found = mt.autobatch(job.step, job.make_batch, budget="30MB", state=job.state, progress=False)
    assert found.trials
    for trial in found.trials:
        assert trial.predicted_bytes is None or trial.predicted_bytes <= found.budget_bytes
    assert max(job.sizes) <= 2 * found.batch_size, "nothing far above the answer was ever built"


def test_3_measured_and_predicted_stand_apart():
    job = Job()
    estimate = mt.estimate_memory(job.step, job.make_batch(4), state=job.state)
    found = mt.autobatch(job.step, job.make_batch, budget="30MB", max_batch=8, state=job.state, progress=False)
    assert estimate.floor_bytes > 0
    for trial in found.trials:
        row = trial.to_dict()
        assert {"predicted_bytes", "peak_bytes"} <= row.keys()
    assert "predicted" in str(found)
    assert "peak" in str(found)
    report = mt.quantize_model(job.model, 4, 64, method="nearest", progress=False)
    assert report.accuracy is None, "what was not measured is not in the report"


def test_4_a_skipped_layer_is_listed_with_its_reason():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(80, 64), nn.Conv1d(4, 4, 3))
    report = mt.quantize_model(model, 4, 64, method="nearest", progress=False)
    reasons = {row.path: row.reason for row in report.skipped}
    assert set(reasons) == {"layers.1", "layers.2"}
    assert "80" in reasons["layers.1"]
    assert "64" in reasons["layers.1"]
    assert all(reasons.values())
    assert all(path in str(report) for path in reasons)


def test_4_and_5_a_limit_that_does_nothing_says_why(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    with mt.wired_limit("1GB") as wired:
        assert not wired.applied
        assert wired.reason


def test_5_what_a_backend_lacks_is_said_and_raised_only_when_it_was_asked_for_by_name():
    if mx.metal.is_available() or mx.cuda.is_available():
        pytest.skip("this backend can quantize activations")
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    kinds = [type(m) for _, m in model.named_modules()]
    with pytest.raises(mt.MlxTuneError, match=r"(?i)activations"):
        mt.quantize_model(model, mode="nvfp4", bits=4, group_size=16, activations=True, progress=False)
    assert [type(m) for _, m in model.named_modules()] == kinds
