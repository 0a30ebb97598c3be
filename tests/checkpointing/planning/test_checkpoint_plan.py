import json
import signal

import pytest
from mlx.utils import tree_flatten
from planned_training import Model, Training, between

from mlx_tune import checkpoint, is_checkpointed
from mlx_tune.checkpointing.planning import ways


@pytest.mark.cpu_only
def test_apply_and_undo_wrap_exactly_the_planned_blocks(floors):
    training = Training()
    plan = training.plan(between(floors, 0.4))
    names = [name for name, _ in tree_flatten(training.model.parameters())]

    def wrapped():
        return tuple(path for path, module in training.model.named_modules() if is_checkpointed(module))

    handle = plan.apply()
    assert sorted(wrapped()) == sorted(plan.paths)
    assert [name for name, _ in tree_flatten(training.model.parameters())] == names
    assert handle.undo() == len(plan.paths)
    assert handle.undo() == 0
    with plan.apply():
        assert len(wrapped()) == len(plan.paths)
    assert wrapped() == ()
    plan.apply()
    assert plan.undo() == len(plan.paths)
    assert wrapped() == ()
    assert sorted(training.model) == sorted(Model())


def test_blocks_are_listed_in_the_order_they_run():
    plan = Training(Model((64, 64, 128), backwards=True)).plan(10**9)
    assert [b.path for b in plan.blocks] == [f"layers.{i}" for i in (2, 1, 0)]
    assert [b.kind for b in plan.blocks] == [0, 1, 1]


@pytest.mark.cpu_only
def test_the_table_and_the_dictionary_hold_the_figures(floors):
    plan = Training().plan(between(floors, 0.5))
    as_dict = json.loads(json.dumps(plan.to_dict()))
    assert [b["path"] for b in as_dict["blocks"] if b["checkpointed"]] == list(plan.paths)
    assert as_dict["peak_bytes"] == plan.peak_bytes
    assert len(as_dict["trials"]) == len(plan.trials) >= 1
    text = str(plan)
    assert text.startswith(f"Checkpoint plan at batch size 256: {len(plan.paths)} of 5 blocks")
    assert "predicted" in text
    assert "measured under a memory limit of" in text


def test_an_interrupt_while_blocks_are_wrapped_comes_when_they_are_not(floors, monkeypatch):
    training = Training()
    before = training.everything()
    count = 0

    def interrupted(block):
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGINT)
        return checkpoint(block)

    monkeypatch.setattr(ways, "checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.plan(between(floors, 0.5))
    assert count >= 5  # all blocks were wrapped first, and then unwrapped
    assert training.everything() == before
