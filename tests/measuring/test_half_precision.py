from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

import mlx_tune as mt
from mlx_tune.measuring.half_precision import slow_half_precision, times_slower
from mlx_tune.progress import PlainBar


def never(dtype: str) -> float:
    raise AssertionError(f"{dtype} was measured")


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_that_is_slow_is_told_with_the_figure(dtype: str) -> None:
    lines: list[str] = []
    bar = PlainBar("autobatch", None, lines.append, lambda: 0.0)
    said = slow_half_precision({"w": mx.zeros((8, 8), getattr(mx, dtype))}, bar, slower=lambda name: 7.2)
    assert len(said) == 1
    assert f"Most numbers here are {dtype}" in said[0]
    assert "took 7 times as long as in float32 (measured, 256 x 256)" in said[0]
    assert lines == [f"autobatch: {said[0]}"]


def test_half_precision_that_is_not_slow_is_not() -> None:
    assert slow_half_precision(mx.zeros((8, 8), mx.bfloat16), slower=lambda name: 1.2) == []


def test_most_of_the_numbers_count_and_float32_is_not_measured() -> None:
    mixed = [mx.zeros((8, 8)), mx.zeros((2, 2), mx.bfloat16)]
    assert slow_half_precision(mixed, slower=never) == []
    assert slow_half_precision((), slower=never) == []


def test_a_gpu_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr("mlx_tune.measuring.half_precision.computes_on_cpu", lambda: False)
    assert slow_half_precision(mx.zeros((8, 8), mx.bfloat16), slower=never) == []


def test_the_measurement_is_a_ratio_of_two_times() -> None:
    assert times_slower("bfloat16") > 0


@pytest.mark.cpu_only
@pytest.mark.parametrize("search", ["autobatch", "autofit", "plan_checkpoints", "tightest_limit"])
def test_every_search_says_it_at_its_start_and_in_its_result(search: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("mlx_tune.measuring.half_precision.times_slower", lambda dtype: 9.0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)])
    model.set_dtype(mx.bfloat16)
    optimizer = optim.SGD(learning_rate=0.01)
    loss = nn.value_and_grad(model, lambda model, x: model(x).square().mean())

    def step(x: mx.array) -> mx.array:
        value, gradients = loss(model, x)
        optimizer.update(model, gradients)
        return value

    def make_batch(n: int) -> mx.array:
        return mx.ones((n, 16), mx.bfloat16)

    state = (model, optimizer)
    if search == "autobatch":
        result = mt.autobatch(step, make_batch, budget="10MB", max_batch=1, state=state)
    elif search == "autofit":
        result = mt.autofit(model, step, make_batch, budget="10MB", max_batch=1, state=optimizer)
    elif search == "plan_checkpoints":
        result = mt.plan_checkpoints(model, step, make_batch, batch_size=1, budget="10MB", state=optimizer)
    else:
        result = mt.tightest_limit(step, make_batch(1), state=state, repeats=1)
    text = "Most numbers here are bfloat16"
    assert text in str(result)
    assert text in capsys.readouterr().err
