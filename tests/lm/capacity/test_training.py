"""Courses of shortened models against those of the whole ones."""

from __future__ import annotations

import pytest
from mlx_lm.tuner.trainer import TrainingArgs
from workload_models import configuration

from mlx_tune import lm
from mlx_tune.lm.capacity.depth import DeepCourse
from mlx_tune.lm.capacity.training import TrainedModel, Tuning, training_course
from mlx_tune.lm.capacity.unloaded import Unloaded
from mlx_tune.lm.preparation import StandInRows
from mlx_tune.trees import nbytes_of


def courses(family: str, tuning: Tuning, blocks: int, checkpoint: bool = False, rows: int = 2, backend: str = "cpu"):
    model = TrainedModel(Unloaded(configuration(family, num_hidden_layers=blocks)), tuning)

    def trace(repeats, rows, length):
        return training_course(model.shorter(repeats), tuning, rows, length, backend=backend, checkpoint=checkpoint)

    return model, trace, DeepCourse(model.depths, trace, rows, 65)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_a_course_is_the_estimate_of_the_same_step(family):
    model, trace, _ = courses(family, Tuning(num_layers=2), 3)
    course = trace(model.depths.deep, 4, 65)
    real = TrainedModel(model.unloaded, model.tuning).whole
    args = TrainingArgs(batch_size=4, max_seq_length=65)
    estimate = lm.estimate_memory(real, StandInRows(8, 65, 512), args, plain_loss=True, backend="cpu")
    assert (course.peak_bytes, course.start_bytes) == (estimate.floor_bytes, estimate.start_bytes)


@pytest.mark.parametrize("blocks", [12, 13])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba2", "deepseek_v3", "gpt_oss"])
def test_blocks_that_are_not_trained_are_left_out_exactly(family, blocks):
    model, trace, course = courses(family, Tuning(num_layers=3), blocks)
    assert not course.extrapolated
    assert sum(model.depths.low) < sum(model.depths.deep)
    for rows, length in ((1, 65), (5, 65), (1, 129)):
        assert course(rows, length).peak_bytes == trace(model.depths.deep, rows, length).peak_bytes


def test_a_gpu_holds_about_as_much_beside_the_blocks_that_are_left_out():
    model, trace, course = courses("llama", Tuning(num_layers=3), 13, backend="metal")
    for rows in (1, 5):
        real = trace(model.depths.deep, rows, 65).peak_bytes
        assert course(rows, 65).peak_bytes == pytest.approx(real, rel=0.05)  # command buffers end elsewhere


@pytest.mark.parametrize(("tuning", "checkpoint"), [(Tuning("lora", -1), True), (Tuning("full", -1), False)])
def test_deep_models_are_read_off_short_ones(tuning, checkpoint):
    _, trace, course = courses("llama", tuning, 24, checkpoint, rows=8)
    assert course.extrapolated
    for rows, length in ((8, 65), (16, 65), (8, 129)):
        assert course(rows, length).peak_bytes == pytest.approx(trace((24,), rows, length).peak_bytes, rel=0.05)


def test_adapters_grow_with_their_rank():
    starts = []
    for tuning in (Tuning(rank=4), Tuning(rank=32), Tuning("dora", rank=32)):
        model, trace, _ = courses("llama", tuning, 3)
        starts.append(trace(model.depths.deep, 1, 33).start_bytes)
    assert starts == sorted(set(starts))


def test_optimizers_hold_what_they_hold():
    starts = {}
    for name in ("sgd", "adam"):
        model, trace, _ = courses("llama", Tuning("full", optimizer=name), 2)
        starts[name] = trace(model.depths.deep, 1, 33).start_bytes
    model = courses("llama", Tuning("full"), 2)[0].whole
    trained = nbytes_of(model.trainable_parameters())
    assert starts["adam"] - starts["sgd"] == pytest.approx(trained, rel=0.01)  # one moment more than a velocity


def test_an_architecture_that_cannot_be_shortened_is_traced_whole(monkeypatch):
    from mlx_tune.lm.capacity import unloaded

    monkeypatch.setattr(unloaded, "shortened", lambda config, keep: {**config, "num_hidden_layers": "no number"})
    model, _, course = courses("llama", Tuning(num_layers=2), 9)
    assert model.depths.deep == ()
    assert course(2, 65).peak_bytes == training_course(model.whole, model.tuning, 2, 65, backend="cpu").peak_bytes
