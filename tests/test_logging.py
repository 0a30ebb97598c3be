"""The log of the library: one name above all, silent until somebody listens, with what a user wants to read in it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import mlx_tune as mt
from mlx_tune.progress import Bar, LoggedBar, progress_bar


@pytest.fixture
def heard(caplog):
    """What the library logs, as (level, text)."""
    caplog.set_level(logging.DEBUG, logger="mlx_tune")
    return lambda level="INFO": [r.getMessage() for r in caplog.records if r.levelname == level]


def training():
    mx.random.seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)))
    optimizer = optim.SGD(0.1)
    gradients = nn.value_and_grad(model, lambda x: model(x).square().mean())

    def step(x):
        loss, found = gradients(x)
        optimizer.update(model, found)
        return loss

    return model, step, {"state": (model, optimizer), "progress": False}


def test_commands_and_trials_are_at_info_whether_or_not_progress_is_shown(heard):
    _, step, options = training()
    result = mt.autobatch(step, lambda n: mx.ones((n, 64)), budget="50MB", max_batch=4, **options)
    lines = heard()
    assert lines[0] == "autobatch: begun"
    assert re.fullmatch(r"autobatch: ended after .*", lines[-1])
    for size in {trial.batch_size for trial in result.trials}:
        begun = next(i for i, line in enumerate(lines) if f"trying batch size {size}" in line)
        ended = next(i for i, line in enumerate(lines) if f"batch size {size}: fits, peak " in line)
        assert begun < ended
    assert not heard("WARNING")


def test_a_command_that_stops_says_by_what(heard):
    with pytest.raises(KeyError), progress_bar("work", enabled=False):
        raise KeyError("x")
    begun, stopped = heard()
    assert begun == "work: begun"
    assert re.fullmatch(r"work: stopped by KeyError after .*", stopped)


def test_layers_are_at_debug(heard):
    model, _, _ = training()
    mt.quantize_model(model, 4, 64, method="nearest", verify_kernels=False, progress=False)
    assert heard() == ["quantizing: begun", heard()[-1]]
    assert heard("DEBUG")[:2] == ["quantizing: layers.0.layers.0", "quantizing: 1 done"]


def test_every_search_logs_its_trials(heard):
    model, step, options = training()
    make_batch = lambda n: mx.ones((n, 64))  # noqa: E731
    mt.plan_checkpoints(model, step, make_batch, batch_size=2, budget="50MB", steps=1, **options)
    mt.tightest_limit(step, make_batch(2), repeats=1, **options)
    mt.autofit(model, step, make_batch, max_batch=2, budget="50MB", steps=1, **options)
    lines = "\n".join(heard())
    assert re.search(r"plan checkpoints: \d of 2 blocks checkpointed: fits, peak .* a step", lines)
    assert re.search(r"tightest limit: limit .*: [+-]\d+\.\d% in time", lines)
    assert re.search(r"autofit: \d of 2 blocks checkpointed: fits, peak .* a step", lines)


def test_fallbacks_are_warnings(heard):
    _, step, options = training()

    def evaluating(x):
        loss = step(x)
        mx.eval(loss)
        return loss

    mt.autobatch(evaluating, lambda n: mx.ones((n, 64)), budget="50MB", max_batch=2, **options)
    (line,) = heard("WARNING")
    assert line.startswith("small trials took the place of an estimate")


def test_a_bar_hands_on_what_it_logs(heard):
    seen = []

    class Shown(Bar):
        def update(self, **told):
            seen.append(told)

        def advance(self, by=1):
            seen.append(by)

        def say(self, text):
            seen.append(text)

    bar = LoggedBar("work", counted=True, shown=Shown())
    bar.update(text="one", total=3)
    bar.update(text="one", completed=1)
    bar.advance(2)
    bar.say("odd")
    bar.ended("done")
    assert seen == [
        {"completed": None, "total": 3, "text": "one"},
        {"completed": 1, "total": None, "text": "one"},
        2,
        "odd",
    ]
    assert heard("DEBUG") == ["work: one", "work: 3 done", "work: done"]
    assert heard("WARNING") == ["work: odd"]


def test_nobody_who_does_not_listen_hears_anything():
    code = """
import logging, mlx_tune as mt
from mlx_tune.progress import progress_bar
with progress_bar("work", enabled=False) as bar:
    bar.say("odd")
assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("mlx_tune").handlers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
