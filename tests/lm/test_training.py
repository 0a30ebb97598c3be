from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from metal_stand_in import MetalStandIn, metal
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback

import mlx_tune as mt
from mlx_tune import lm
from mlx_tune.memory import open_limit_bytes

__all__ = ["metal"]


def weights(model) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in tree_flatten(model.parameters())}


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


@pytest.mark.cpu_only
@pytest.mark.parametrize("checkpointed", [False, True])
def test_it_trains_what_mlx_lm_trains(toy, rows, arguments, tmp_path, checkpointed: bool) -> None:
    theirs = toy(lora=True)
    np.random.seed(0)
    (tmp_path / "theirs").mkdir()
    trainer.train(
        theirs,
        optim.AdamW(1e-2),
        rows,
        rows[:8],
        args=arguments(adapter_file=tmp_path / "theirs" / "adapters.safetensors"),
    )
    ours = toy(lora=True)
    np.random.seed(0)
    settings = arguments(grad_checkpoint=checkpointed)
    result = lm.train(ours, optim.AdamW(1e-2), rows, rows[:8], settings, plain_loss=True)
    assert same(weights(ours), weights(theirs))
    assert len(result.checkpointed) == (3 if checkpointed else 0)
    names = sorted(file.name for file in (tmp_path / "adapters").iterdir())
    assert names == ["0000002_adapters.safetensors", "0000004_adapters.safetensors", "adapters.safetensors"]
    for name in names:
        a, b = (mx.load(str(tmp_path / folder / name)) for folder in ("adapters", "theirs"))
        assert same(a, b)


def test_what_a_killed_run_left_in_the_adapter_folder_is_cleared(toy, rows, arguments, tmp_path) -> None:
    place = tmp_path / "adapters"
    killed = f"""
import os, signal
from pathlib import Path
from mlx_tune.files.unfinished import beside
with beside(Path({str(place / "adapters.safetensors")!r})) as folder:
    (folder / "adapters.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert len(list(place.glob(".unfinished-*"))) == 1
    lm.train(toy(lora=True), optim.SGD(1e-2), rows, rows[:8], arguments(iters=1))
    assert [file.name for file in place.iterdir()] == ["adapters.safetensors"]


def test_callbacks_are_told_as_by_mlx_lm(toy, rows, arguments) -> None:
    class Callback(TrainingCallback):
        def __init__(self) -> None:
            self.told: list[tuple[str, int]] = []

        def on_train_loss_report(self, train_info: dict) -> None:
            self.told.append(("train", train_info["iteration"]))

        def on_val_loss_report(self, val_info: dict) -> None:
            self.told.append(("val", val_info["iteration"]))

    plain, ours = Callback(), Callback()
    trainer.train(toy(lora=True), optim.SGD(1e-2), rows, rows[:8], arguments(), training_callback=plain)
    lm.train(toy(lora=True), optim.SGD(1e-2), rows, rows[:8], arguments(), training_callback=ours)
    assert ours.told == plain.told == [("val", 0), ("val", 1), ("train", 2), ("val", 3), ("train", 4)]


pytestmark = pytest.mark.usefixtures("adapters_exist")


def test_nothing_is_left_behind(toy, rows, arguments) -> None:
    model = toy(lora=True)
    kinds = [type(module) for module in model.modules()]
    flags = [module.training for module in model.modules()]
    calls = {kind: kind.__call__ for kind in kinds}
    before = mx.set_memory_limit(2**40)
    mx.set_memory_limit(before)
    lm.train(model, optim.SGD(1e-2), rows, None, arguments(grad_checkpoint=True))
    assert [type(module) for module in model.modules()] == kinds
    assert [module.training for module in model.modules()] == flags
    assert all(kind.__call__ is call for kind, call in calls.items())  # mlx-lm's own way patches the class for ever
    assert mx.set_memory_limit(before) == before


class PlantedError(RuntimeError):
    pass


def test_nothing_is_left_behind_by_a_run_that_fails(toy, rows, arguments) -> None:
    model, seen = toy(lora=True), []

    def loss(model, batch, lengths):
        seen.append(mt.is_checkpointed(model.layers[0]))
        raise PlantedError

    kinds = [type(module) for module in model.modules()]
    args = arguments(grad_checkpoint=True)
    with pytest.raises(PlantedError):
        lm.train(model, optim.SGD(1e-2), rows, None, args, loss=loss)
    assert seen == [True]
    assert [type(module) for module in model.modules()] == kinds
    assert list(args.adapter_file.parent.iterdir()) == []


def test_an_interrupted_run_keeps_what_was_saved_whole(toy, rows, arguments) -> None:
    class Impatient(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            if train_info["iteration"] == 4:
                raise KeyboardInterrupt

    args = arguments(iters=8)
    with pytest.raises(KeyboardInterrupt):
        lm.train(toy(lora=True), optim.SGD(1e-2), rows, None, args, training_callback=Impatient())
    names = sorted(file.name for file in args.adapter_file.parent.iterdir())
    assert names == ["0000002_adapters.safetensors", "adapters.safetensors"]


@dataclass
class ChosenFit:
    """What `autofit` returns, as far as training looks at it."""

    model: nn.Module
    batch_size: int = 2
    accumulation_steps: int = 2
    found: int = 3
    entered: list[str] = field(default_factory=list)

    @contextmanager
    def applied(self):
        self.entered.append("in")
        with mt.memory_limit("3GB"), mt.checkpoint_blocks(self.model, every=2):
            yield self
        self.entered.append("out")

    def to_dict(self):
        return {"batch_size": self.batch_size}


def test_a_fit_replaces_batch_accumulation_checkpoints_and_limit(toy, rows, arguments) -> None:
    model = toy(lora=True)
    fit = ChosenFit(model)
    result = lm.train(model, optim.SGD(1e-2), rows, None, arguments(grad_checkpoint=True), fit=fit)
    assert (result.batch_size, result.accumulation_steps) == (2, 2)
    assert result.checkpointed == ("model.layers.0", "model.layers.2")  # the fit's, not every block
    assert result.limit_bytes == 3_000_000_000
    assert result.fit == {"batch_size": 2}
    assert fit.entered == ["in", "out"]
    assert open_limit_bytes() is None


def test_everything_can_be_chosen_on_the_way(toy, rows, arguments) -> None:
    model = toy(lora=True)
    options = {"fit": "auto", "budget": "1GB", "target_batch": 2}
    result = lm.train(model, optim.SGD(1e-2), rows[:4], None, arguments(iters=2, max_seq_length=33), **options)
    assert result.batch_size * result.accumulation_steps == 2
    assert result.fit is not None
    assert not any(mt.is_checkpointed(module) for module in model.modules())


@pytest.mark.cpu_only
def test_a_searched_batch_is_trained_with_under_its_limit(toy, rows, arguments) -> None:
    model, optimizer = toy(lora=True), optim.AdamW(1e-3)
    before = weights(model)
    result = lm.autobatch(model, rows, arguments(), optimizer=optimizer, budget="24MB", max_batch=4, progress=False)
    assert same(weights(model), before)
    assert set(optimizer.state) == {"step", "learning_rate"}
    run = lm.train(model, optimizer, rows, None, arguments(iters=6), fit=result)
    assert run.batch_size == result.batch_size
    assert run.limit_bytes == result.limit_bytes
    assert run.peak_bytes <= result.budget_bytes


def test_a_block_that_ends_during_training_stays_ended(toy, rows, arguments, metal: MetalStandIn) -> None:
    model, during = toy(lora=True), []
    other = mt.wired_limit(7 << 30)

    class Watch(TrainingCallback):
        def on_train_loss_report(self, train_info: dict) -> None:
            if not during:
                other.__exit__(None, None, None)
            during.append(metal.limit)

    other.__enter__()
    lm.train(model, optim.SGD(1e-2), rows, None, arguments(), training_callback=Watch())
    assert 0 < during[0] < 1 << 30  # the model alone
    assert metal.limit == 0


@pytest.mark.parametrize("search", [lm.autobatch, lm.autofit])
def test_accumulation_that_was_asked_for_stays(toy, rows, arguments, search) -> None:
    model, args = toy(lora=True), arguments(grad_accumulation_steps=2, max_seq_length=33, iters=2)
    found = search(model, rows, args, budget="1GB", max_batch=2, progress=False)
    assert found.accumulation_steps == 2
    assert "x 2 accumulation steps = 4" in str(found)
    assert lm.train(model, optim.SGD(1e-2), rows, None, args, fit=found).accumulation_steps == 2


def test_a_fit_that_left_checkpoints_alone_goes_with_those_of_the_arguments(toy, rows, arguments) -> None:
    model, args, seen = toy(lora=True), arguments(max_seq_length=33, iters=2, grad_checkpoint=True), set()

    def loss(model, batch, lengths):
        seen.add(mt.is_checkpointed(model.layers[0]))
        return trainer.default_loss(model, batch, lengths)

    fit = lm.autofit(model, rows, args, loss=loss, budget="1GB", max_batch=4, checkpoint=False, progress=False)
    assert seen == {True}
    assert (fit.paths, fit.found) == ((), 0)
    assert len(lm.train(model, optim.SGD(1e-2), rows, None, args, fit=fit).checkpointed) == 3


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("quantized", [False, True])
def test_every_kind_of_fine_tuning_learns(toy, rows, arguments, kind: str, quantized: bool) -> None:
    model = toy()
    if quantized:
        nn.quantize(model, 32, 4)
    lm.add_adapters(model, kind, num_layers=1, lora_parameters={"rank": 4, "scale": 10.0, "dropout": 0.1})
    before = weights(model)
    mx.random.seed(0)
    np.random.seed(0)
    few = rows[:4]
    batch = next(trainer.iterate_batches(few, 4, 64))
    first = trainer.default_loss(model, *batch)[0].item()
    lm.train(model, optim.Adam(3e-3), few, None, arguments(iters=8, grad_checkpoint=True))
    assert trainer.default_loss(model, *batch)[0].item() < first - 0.01
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert all(mx.array_equal(value, before[name]) for name, value in weights(model).items() if name not in trained)


def test_unfrozen_codes_are_refused_by_name(toy, rows, arguments) -> None:
    model = toy()
    nn.quantize(model, 64, 4)
    model.layers[0].unfreeze()
    for train in (lm.train, lambda m, o, d, v, a: lm.autobatch(m, d, a, optimizer=o, progress=False)):
        with pytest.raises(mt.InvalidArgumentError, match=r"whole numbers.*weight.*add_adapters"):
            train(model, optim.SGD(1e-2), rows, None, arguments())


@pytest.mark.parametrize(
    ("options", "changes", "text"),
    [
        ({"budget": "1GB"}, {}, 'pass fit="auto" with them'),
        ({"target_batch": 8}, {}, 'pass fit="auto" with them'),
        ({"fit": "automatic"}, {}, "fit='automatic': pass \"auto\""),
        ({}, {"batch_size": 0}, "batch_size=0: it must be a positive multiple"),
        ({}, {"batch_size": 9}, "31 training rows and 8 validation rows"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(toy, rows, arguments, options, changes, text) -> None:
    with pytest.raises(mt.InvalidArgumentError, match=text):
        lm.train(toy(lora=True), optim.SGD(1e-2), rows, rows[:8], arguments(**changes), **options)


def test_a_target_batch_and_given_accumulation_contradict_each_other(toy, rows, arguments) -> None:
    args = arguments(grad_accumulation_steps=4)
    with pytest.raises(mt.InvalidArgumentError, match="grad_accumulation_steps=4 both say"):
        lm.autobatch(toy(lora=True), rows, args, target_batch=8)
