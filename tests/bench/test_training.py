import mlx.core as mx
import pytest

from mlx_tune.bench import training
from mlx_tune.bench.sizes import TOY, LeftOutError
from mlx_tune.trees import arrays_of

ROOM = TOY.most_bytes


def test_the_step_trains():
    job = training.make_job(TOY)
    batch, _ = training.settle(job, 2, ROOM)
    assert batch.shape == (2, TOY.tokens + 1)
    losses = []
    for _ in range(8):
        losses.append(job.step(batch).item())
        mx.eval(job.model.parameters(), job.optimizer.state)
    assert losses[-1] < losses[0]


def test_what_is_predicted_before_anything_is_made_is_what_holds_afterwards():
    job = training.make_job(TOY)
    before = mx.get_active_memory()
    with pytest.raises(LeftOutError):
        training.settle(job, TOY.rows, 1000)
    assert mx.get_active_memory() - before < 1000
    batch, estimate = training.settle(job, TOY.rows, ROOM)
    made = sum(array.nbytes for array in arrays_of((job.model.parameters(), job.optimizer.state)))
    assert mx.get_active_memory() - before > made - 1000
    again = training.estimate_memory(job.step, batch, state=job.state)
    assert (again.floor_bytes, again.peak_bytes) == (estimate.floor_bytes, estimate.peak_bytes)


@pytest.mark.cpu_only
def test_floors_are_measured_beside_the_prediction():
    found = training.floors(TOY, ROOM)
    assert set(found) == {"plain", "checkpointed"}
    for step in found.values():
        # Where the worker falls behind, as on a busy machine, more is held; never less.
        assert step["floor_bytes"] >= 0.95 * step["predicted_floor_bytes"]
        assert step["floor_bytes"] <= step["peak_bytes"]
    assert found["checkpointed"]["predicted_floor_bytes"] < found["plain"]["predicted_floor_bytes"]


def test_the_curve_goes_from_the_floor_upwards():
    found = training.limits(TOY, ROOM)
    limits = [point["limit_bytes"] for point in found["curve"]]
    assert limits == sorted(limits)
    assert all(point["peak_bytes"] >= found["held_back_peak_bytes"] * 0.95 for point in found["curve"])
    assert found["tightest"]["peak_bytes"] <= found["free_peak_bytes"]
    assert all(point["seconds"] > 0 for point in found["curve"])


def test_gradients_of_checkpointed_blocks_are_compared():
    found = training.gradients(TOY, ROOM)
    assert found["equal"]
    assert found["parameters"] > 10


def test_wrong_gradients_are_seen(monkeypatch):
    from mlx_tune.checkpointing import verify

    found = verify._difference
    monkeypatch.setattr(verify, "_difference", lambda a, b: found(a, b) + (a.size > 1))
    assert training.gradients(TOY, ROOM)["largest_difference"] >= 1


def test_a_search_is_measured_with_its_trials_and_training_at_its_answer():
    found = training.search(TOY, ROOM)
    assert 1 <= found["batch_size"] <= TOY.budget_rows
    assert found["trial_peaks_bytes"]
    assert 0 < found["trained_peak_bytes"] <= found["budget_bytes"] * 1.05
    assert found["steps_of_the_answer"] > 0
