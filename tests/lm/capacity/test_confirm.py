"""A real step beside its prediction."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from toy_models import CONFIGS

from mlx_tune.devices import backend
from mlx_tune.errors import BudgetError, InvalidArgumentError
from mlx_tune.lm.capacity import confirm
from mlx_tune.lm.capacity.answer import fits
from mlx_tune.lm.capacity.configuration import read_configuration
from mlx_tune.lm.capacity.training import TrainedModel, Tuning
from mlx_tune.lm.capacity.unloaded import Unloaded
from mlx_tune.memory import MemoryBudget


@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 4}, {"fine_tune_type": "full", "optimizer": "sgd"}, {"budget": "2MB"}],
    ids=["as it is", "packed", "full", "checkpointed"],
)
def test_one_step_is_measured_beside_its_prediction(model_folder, options):
    answer = fits(model_folder("tied"), machine="Mac 16GB", max_seq_length=128, batch_size=4, confirm=True, **options)
    found = answer.confirmation
    assert found.way == answer.chosen.way
    assert found.backend == backend()
    # Dispatch runs ahead of the device under a limit too, and of a small step by a large share.
    assert found.predicted_bytes * 0.97 <= found.measured_bytes <= found.predicted_bytes * 2
    assert found.seconds > 0
    text = str(answer)
    assert "Figures are predicted" in text
    assert f"Confirmed on this machine ({found.backend}), {found.way}: predicted " in text
    assert ", measured " in text
    plain = json.loads(json.dumps(answer.to_dict()))["confirmation"]
    assert {plain["predicted_bytes"], plain["measured_bytes"]} == {found.predicted_bytes, found.measured_bytes}


def test_a_step_leaves_no_memory_behind(model_folder):
    fits(model_folder("tied"), machine="Mac 16GB", max_seq_length=64, confirm=True)
    held = mx.get_active_memory()
    fits(model_folder("tied"), machine="Mac 16GB", max_seq_length=64, confirm=True)
    assert mx.get_active_memory() - held < 1e5


def test_a_config_beside_its_weights_is_enough(model_folder):
    answer = fits(model_folder("tied") / "config.json", machine="Mac 16GB", max_seq_length=64, confirm=True)
    assert answer.confirmation is not None


def test_without_weights_it_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["tied"]))
    for model in (tmp_path, CONFIGS["tied"], tmp_path / "config.json"):
        with pytest.raises(InvalidArgumentError, match=r"the weights of .* are not here, and a real step needs them"):
            fits(model, machine="Mac 16GB", max_seq_length=64, confirm=True)


def test_weights_in_the_hubs_cache_are_found_and_never_fetched(monkeypatch, model_folder, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked, folder = [], model_folder("tied")

    def snapshot(name, *, revision, local_files_only):
        asked.append((name, revision, local_files_only))
        if name == "owner/gone":
            raise LocalEntryNotFoundError("not cached")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    described = confirm.Described("mine", {})
    assert confirm.folder_of(described, "owner/mine", "main") == folder
    with pytest.raises(InvalidArgumentError, match="fetch a hub name with `hf download` first"):
        confirm.folder_of(described, "owner/gone", None)
    assert asked == [("owner/mine", "main", True), ("owner/gone", None, True)]


def test_a_step_that_is_predicted_not_to_fit_here_is_not_run(monkeypatch, model_folder):
    monkeypatch.setattr(confirm, "memory_budget", lambda: MemoryBudget(1 << 20, "a test", 1.0, ()))
    monkeypatch.setattr("mlx_tune.measuring.step.run_step", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(BudgetError, match=r"plain, batch 1 at 128 tokens is predicted to need .* on this machine"):
        fits(model_folder("tied"), machine="Mac 16GB", confirm=True, max_seq_length=128)


def test_weights_that_cannot_be_packed_in_what_is_free_are_not_read(model_folder):
    folder = model_folder("tied")
    trained = TrainedModel(Unloaded(read_configuration(folder).config, bits=4), Tuning())
    with pytest.raises(BudgetError, match=r"packing the weights needs .* Quantize to a folder first") as raised:
        confirm.load_packed(folder, trained.unloaded, trained.weights_bytes, trained.weights_bytes)
    assert raised.value.budget_bytes == trained.weights_bytes < raised.value.needed_bytes
