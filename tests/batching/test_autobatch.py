"""autobatch from end to end: the answer, what it leaves behind, and what it says of bad input."""

import gc
import json
import re
import signal
import sys

import keeping_up
import mlx.core as mx
import mlx.nn as nn
import pytest
import small_steps
from mlx.utils import tree_flatten

import mlx_tune as mt
import mlx_tune.devices
from mlx_tune.batching import autobatch, autobatch_by_length
from mlx_tune.errors import InvalidArgumentError

OPTIONS = {"progress": False}


def bits(state):
    """Every array's exact bytes, by path, and the random stream."""
    model, optimizer = state
    flat = [*tree_flatten(model.state), *tree_flatten(optimizer.state)]
    kept = [
        (k, v.dtype, v.shape, bytes(memoryview(v.reshape(-1).view(mx.uint8))))
        for k, v in flat
        if isinstance(v, mx.array)
    ]
    return kept, mx.random.state[0].tolist(), model.training, limits()


def limits():
    memory, cache = mx.set_memory_limit(1), mx.set_cache_limit(0)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    return memory, cache


def least_peak(step, state, n):
    """The smallest peak of a few fully throttled steps."""
    batch = small_steps.make_batch(n)
    mx.eval(batch)
    return min(
        keeping_up.throttled_peak(lambda: mx.eval(step(batch), state[0].state, state[1].state)) for _ in range(4)
    )


@pytest.mark.skipif(not keeping_up.CAN_KEEP_UP, reason="threads cannot choose their core here")
@pytest.mark.parametrize("compiled", ["", pytest.param("compiled", marks=pytest.mark.slow)])
def test_the_answer_is_the_largest_that_fits_and_no_trial_went_above(compiled):
    """Where the worker falls behind, a step takes more than it needs, and then fewer rows may truly be all that fit."""
    result = json.loads(keeping_up.in_own_process(__file__, compiled))
    assert result["batch_size"] == 4
    assert result["peak_bytes"] <= result["budget_bytes"]
    assert result["limit_bytes"] <= result["budget_bytes"]
    assert all(trial["floor_bytes"] <= result["budget_bytes"] for trial in result["trials"] if trial["fits"])
    assert result["next_size"] == 5
    assert result["next_bytes"] > result["budget_bytes"]


def test_everything_is_as_it_was():
    step, make_batch, state = small_steps.build(dropout=0.3)
    mx.eval(step(make_batch(1)), state[0].state, state[1].state)
    before = bits(state)
    gc.collect()
    mx.synchronize()
    held = mx.get_active_memory()
    autobatch(step, make_batch, budget="10MB", max_batch=4, state=state, canary=True, **OPTIONS)
    mx.synchronize()
    assert bits(state) == before
    assert abs(mx.get_active_memory() - held) < 100_000


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 8])
def test_everything_is_as_it_was_after_an_exception_in_any_trial(error, at):
    step, make_batch, state = small_steps.build()
    before = bits(state)
    calls = []

    def failing(x):
        loss = step(x)
        mx.eval(loss, state[0].state, state[1].state)
        calls.append(1)
        if len(calls) == at:
            raise error("mine")
        return loss

    with pytest.raises(error, match="mine"):
        autobatch(failing, make_batch, budget="10MB", max_batch=4, state=state, **OPTIONS)
    assert len(calls) == at
    assert bits(state) == before


@pytest.mark.parametrize("moment", ["in a step", "in make_batch", "between steps", "while limits are set"])
def test_ctrl_c_at_any_moment_leaves_everything_as_it_was(moment, monkeypatch, tmp_path):
    """A real signal, not an exception: it may come between any two lines."""
    step, make_batch, state = small_steps.build(dropout=0.3)
    mx.eval(step(make_batch(1)), state[0].state, state[1].state)
    gc.collect()  # since Python 3.12 this freezes what lives for ever, a few hundred objects
    before, frozen = bits(state), gc.get_freeze_count()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    calls = []

    def interrupting(function):
        def called(*args):
            calls.append(1)
            if len(calls) == (2 if moment == "while limits are set" else 3):
                signal.raise_signal(signal.SIGINT)
            return function(*args)

        return called

    if moment == "in a step":
        step = interrupting(step)
    elif moment == "in make_batch":
        make_batch = interrupting(make_batch)
    elif moment == "between steps":
        monkeypatch.setattr(gc, "collect", interrupting(gc.collect))
    else:
        monkeypatch.setattr(mx, "set_memory_limit", interrupting(mx.set_memory_limit))
    with pytest.raises(KeyboardInterrupt):
        autobatch(step, make_batch, budget="10MB", max_batch=4, state=state, **OPTIONS)
    monkeypatch.undo()
    assert len(calls) >= 2
    assert bits(state) == before
    assert list(tmp_path.iterdir()) == []
    gc.collect()
    assert gc.get_freeze_count() == frozen


def test_training_under_the_result_stays_within_the_budget():
    step, make_batch, state = small_steps.build()
    result = autobatch(step, make_batch, budget="10MB", state=state, **OPTIONS)
    mx.clear_cache()
    with result.applied() as applied, mt.track_memory() as memory:
        mx.eval(step(make_batch(result.batch_size)), state[0].state, state[1].state)
    assert applied is result
    assert memory.peak_bytes <= 1.15 * result.budget_bytes
    assert limits()[0] != result.limit_bytes


def test_accumulation_multiplies_exactly_to_the_target():
    step, make_batch, state = small_steps.build()
    result = autobatch(step, make_batch, budget="8MB", target_batch=60, multiple_of=2, state=state, **OPTIONS)
    assert result.batch_size * result.accumulation_steps == 60
    assert result.batch_size % 2 == 0
    assert {trial.batch_size for trial in result.trials} <= {2, 4, 6, 10, 12, 20, 30, 60}
    assert f"x {result.accumulation_steps} accumulation steps = 60" in str(result)


def test_a_slowdown_is_held_against_unhindered_steps():
    step, make_batch, state = small_steps.build()
    result = autobatch(step, make_batch, budget="10MB", slowdown=1000.0, state=state, **OPTIONS)
    largest = max(trial.batch_size for trial in result.trials if trial.fits)
    assert result.batch_size == largest  # a thousand times slower is never reached


def test_without_a_graph_two_small_trials_do():
    step, make_batch, state = small_steps.build()

    def evaluating(x):
        loss = step(x)
        return loss if loss.item() > 0 else None

    result = autobatch(evaluating, make_batch, budget="10MB", max_batch=8, state=state, **OPTIONS)
    assert [trial.batch_size for trial in result.trials][:2] == [1, 2]
    assert any("small trials took the place of an estimate" in note for note in result.notes)


def test_a_journal_spares_a_second_search_its_trials(tmp_path):
    step, make_batch, state = small_steps.build()
    options = {"budget": "10MB", "max_batch": 3, "state": state, "journal": tmp_path / "journal.jsonl", **OPTIONS}
    first = autobatch(step, make_batch, **options)
    forecast_calls = []

    def counted(x):
        forecast_calls.append(x.shape[0])
        return step(x)

    second = autobatch(counted, make_batch, **options)
    assert second.batch_size == first.batch_size
    assert second.trials[-1] == first.trials[-1]


@pytest.mark.parametrize("budget", [None, 0.001, "0.1 %"])
def test_a_journal_of_a_share_of_the_machine_is_taken_up_when_other_bytes_are_free(budget, tmp_path, monkeypatch):
    step, make_batch, state = small_steps.build()
    options = {"budget": budget, "max_batch": 2, "state": state, "journal": tmp_path / "journal.jsonl", **OPTIONS}
    first = autobatch(step, make_batch, **options)
    rooms = mt.devices.free_rooms()
    less = tuple(mt.devices.Room(room.bytes // 2, room.source) for room in rooms)
    monkeypatch.setattr("mlx_tune.devices.free_rooms", lambda: less)
    second = autobatch(step, make_batch, **options)
    assert second.budget_bytes == first.budget_bytes
    assert second.trials[-1] == first.trials[-1]


def test_by_length_gives_shorter_rows_larger_batches():
    model = nn.Embedding(64, 256)
    grad = nn.value_and_grad(model, lambda tokens: nn.gelu(model(tokens)).square().mean())
    make_batch = lambda n, length: mx.ones((n, length), mx.int32)  # noqa: E731
    results = autobatch_by_length(grad, make_batch, [128, 64], budget="4MB", state=model, **OPTIONS)
    assert list(results) == [64, 128]
    assert results[64].batch_size > results[128].batch_size
    assert all(result.peak_bytes <= 4_000_000 for result in results.values())
    assert results[64].unit == "tokens"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_batch": 8, "max_batch": 4}, "min_batch=8 is above max_batch=4: no size lies between."),
        ({"min_batch": 0}, "min_batch=0: give a whole number of at least 1."),
        ({"max_batch": 2.5}, "max_batch=2.5: give a whole number of at least 1."),
        (
            {"max_batch": 5, "min_batch": 5, "multiple_of": 4},
            "no multiple of multiple_of=4, at least min_batch=5 and at most",
        ),
        ({"target_batch": 9, "multiple_of": 2}, "no multiple of multiple_of=2 that divides target_batch=9"),
        ({"steps": 0}, "steps=0: give a whole number of at least 1"),
        ({"slowdown": -0.1}, "slowdown=-0.1: give a share of at least 0"),
        ({"isolate": True}, 'isolate=True: write it as "module:function"'),
        ({"isolate": "no_colon"}, "isolate='no_colon': write it as \"module:function\""),
        ({"isolate": ":build"}, "isolate=':build': write it as \"module:function\""),
        ({"trial_timeout": 3.0}, "trial_timeout=3.0: only a trial in its own process can be ended"),
        ({"isolate": "a:b", "canary": True}, "canary=True runs in this process"),
        ({"budget": "much"}, "'much' is not a number of bytes"),
    ],
)
def test_bad_arguments_are_named(options, text):
    step, make_batch, state = small_steps.build()
    before = bits(state)
    options = {"budget": "10MB", "state": state, **OPTIONS, **options}
    with pytest.raises(
        InvalidArgumentError, match=re.escape(text) if "no multiple" not in text else text.replace("(", r"\(")
    ):
        autobatch(step, make_batch, **options)
    assert bits(state) == before


def test_functions_are_asked_for():
    with pytest.raises(InvalidArgumentError, match=r"step=None, make_batch=None: both must be functions"):
        autobatch(**OPTIONS)


def test_lengths_are_asked_for():
    with pytest.raises(InvalidArgumentError, match=r"lengths=\[\]: give at least one"):
        autobatch_by_length(lambda x: x, lambda n, length: None, [])


if __name__ == "__main__":
    keeping_up.keep_up()
    step, make_batch, state = small_steps.build(compiled=sys.argv[1] == "compiled")
    budget = (least_peak(step, state, 4) + least_peak(step, state, 5)) // 2
    result = autobatch(step, make_batch, budget=budget, state=state, **OPTIONS)
    print(json.dumps(result.to_dict()))
