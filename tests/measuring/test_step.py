"""Measuring a step, and comparing two ways of doing one in turns."""

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlx_tune.errors import TrialError
from mlx_tune.measuring.step import run_step
from mlx_tune.trees import arrays_of


def test_a_step_is_evaluated_with_what_it_changes():
    state = {"total": mx.zeros((1000,))}

    def step(x):
        state["total"] = state["total"] + x
        return x.sum()

    gc.collect()  # other tests' arrays would leave in between
    before = mx.get_active_memory()
    trial = run_step(step, [mx.ones((1000,))], state)
    assert trial.peak_bytes >= before + 4000
    assert trial.seconds > 0
    assert trial.to_dict() == {"limit_bytes": None, "peak_bytes": trial.peak_bytes, "seconds": trial.seconds}
    assert state["total"].tolist() == [1.0] * 1000


def test_the_limit_holds_during_the_step_only():
    seen = []

    def step():
        seen.append(mx.set_memory_limit(1 << 30))
        mx.set_memory_limit(seen[-1])
        return mx.zeros(1)

    before = mx.set_memory_limit(2**40)
    try:
        assert run_step(step, (), limit_bytes=12345678).limit_bytes == 12345678
        assert seen == [12345678]
        assert mx.set_memory_limit(2**40) == 2**40
    finally:
        mx.set_memory_limit(before)


@pytest.mark.parametrize("state_first", [False, True])
def test_the_state_is_evaluated_before_or_after_the_outputs(monkeypatch, state_first):
    state, order = [mx.zeros(3)], []
    monkeypatch.setattr(mx, "eval", lambda *trees: order.append([a.size for a in arrays_of(trees)]))
    run_step(lambda: mx.zeros(2), (), state, state_first=state_first)
    assert order[0] == ([3, 2] if state_first else [2, 3])


def test_a_step_without_arrays_is_an_error():
    with pytest.raises(TrialError, match="step returned a dict without arrays: it must return arrays, the loss first"):
        run_step(lambda: {"loss": 1.0}, ())


def test_arrays_are_found_in_modules_and_optimizers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    optimizer = optim.Adam(1e-3)
    optimizer.init(model.trainable_parameters())
    assert len(list(arrays_of(model))) == 3
    assert len(list(arrays_of((model, optimizer)))) == 3 + 2 * 3 + 2  # two moments each, the step and the rate
    assert len(list(arrays_of([model.layers[0], {"a": (mx.zeros(1), "text", 3)}]))) == 3
    assert list(arrays_of(None)) == []
