import os
import shutil
import signal
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
import mlx_tune.quantization.models.transaction as transaction_module
from mlx_tune.quantization import methods
from mlx_tune.quantization.judging.evaluation import Evaluation
from mlx_tune.quantization.models.sites import Site, WalkedModel
from mlx_tune.quantization.models.transaction import Transaction
from mlx_tune.upstream import is_lazy


class FailedError(Exception):
    pass


@contextmanager
def failing(model: nn.Module, **options: Any) -> Iterator[Transaction]:
    """A transaction whose block fails at its end."""
    with pytest.raises(FailedError), Transaction(WalkedModel(model), **options) as transaction:  # noqa: PT012
        yield transaction
        raise FailedError


def site_at(transaction: Transaction, path: str) -> Site:
    return next(site for site in transaction.model.sites if path in site.paths)


def swap(transaction: Transaction, path: str, module: nn.Module) -> None:
    transaction.replace(site_at(transaction, path), module)


def wide(layers: int = 4, width: int = 512) -> nn.Sequential:
    mx.random.seed(3)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    mx.eval(model.parameters())
    return model


def quantize_all(transaction: Transaction) -> None:
    model: Any = transaction.model.model
    for i in range(len(model.layers)):
        new = model.layers[i].to_quantized(64, 4)
        mx.eval(new.parameters())
        swap(transaction, f"layers.{i}", new)
        del new


def test_a_failure_puts_everything_back(tmp_path: Path) -> None:
    model = toys.llama(tied=False)
    before, modules = toys.arrays_of(model), [type(m) for m in model.modules()]
    with failing(model, folder=tmp_path) as transaction:
        swap(transaction, "lm_head", model.lm_head.to_quantized(64, 4))
        swap(transaction, "model.layers.1.mlp.up_proj", nn.ReLU())
        swap(transaction, "model.layers.1.mlp.up_proj", nn.GELU())
    assert toys.same_arrays(before, toys.arrays_of(model))
    assert [type(m) for m in model.modules()] == modules
    assert list(tmp_path.iterdir()) == []


def interrupting(monkeypatch, owner: Any, name: str, at: int) -> None:
    """Have the system send a Ctrl-C during one of the calls of a function."""
    real, calls = getattr(owner, name), []

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (methods, "pack_weight", 3),
        (methods, "signal_to_noise_db", 15),
        (Site, "put", 1),
        (Site, "put", 15),
        (mx, "save_safetensors", 4),
        (Evaluation, "judge", 1),
    ],
)
def test_a_ctrl_c_at_any_moment_leaves_the_model_as_it_was(monkeypatch, tmp_path, owner, name: str, at: int) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = toys.llama()
    before, kinds = toys.arrays_of(model), [type(m) for m in model.modules()]
    interrupting(monkeypatch, owner, name, at)
    with pytest.raises(KeyboardInterrupt):
        mt.quantize_model(model, 4, 64, method="nearest", evaluation=[toys.tokens()], progress=False)
    assert toys.same_arrays(before, toys.arrays_of(model))
    assert [type(m) for m in model.modules()] == kinds
    assert all(m.training for m in model.modules())
    assert list(tmp_path.iterdir()) == []


def test_a_second_ctrl_c_waits_until_everything_is_back(monkeypatch) -> None:
    model = toys.llama(tied=False)
    before, kinds = toys.arrays_of(model), [type(m) for m in model.modules()]
    with pytest.raises(KeyboardInterrupt), Transaction(WalkedModel(model)) as transaction:  # noqa: PT012
        for i in range(2):
            swap(transaction, f"model.layers.{i}.mlp.up_proj", nn.ReLU())
        interrupting(monkeypatch, Site, "put", 1)
        raise FailedError
    assert toys.same_arrays(before, toys.arrays_of(model))
    assert [type(m) for m in model.modules()] == kinds


def test_success_leaves_no_file_and_keeps_the_swaps(tmp_path: Path) -> None:
    model = wide()
    with Transaction(WalkedModel(model), folder=tmp_path, kept_bytes=0) as transaction:
        quantize_all(transaction)
        assert len(list(tmp_path.glob("mlx_tune-originals-*/*/*.safetensors"))) == 4
        assert transaction.notes == []
    assert list(tmp_path.iterdir()) == []
    assert all(isinstance(layer, nn.QuantizedLinear) for layer in model.layers)


def test_replaced_weights_leave_memory(tmp_path: Path) -> None:
    model = wide()
    one = 512 * 512 * 4
    before = mx.get_active_memory()
    with Transaction(WalkedModel(model), folder=tmp_path, kept_bytes=0) as transaction:
        mx.reset_peak_memory()
        quantize_all(transaction)
        assert mx.get_active_memory() < before - 3 * one
        assert mx.get_peak_memory() < before + one
        kept = mx.get_active_memory()
        with failing(model, folder=tmp_path):
            pass
        assert mx.get_active_memory() == kept


def test_undoing_needs_no_more_than_the_model_and_a_layer(tmp_path: Path) -> None:
    model = wide()
    before = mx.get_active_memory()
    with failing(model, folder=tmp_path) as transaction:
        quantize_all(transaction)
        mx.reset_peak_memory()
    assert mx.get_peak_memory() <= before + 512 * 512 * 4
    mx.synchronize()  # a GPU lets go of what a kernel read when the kernel has run
    assert mx.get_active_memory() <= before


def test_a_lazily_loaded_model_is_lazy_again_after_a_failure(tmp_path: Path) -> None:
    model = wide()
    mx.save_safetensors(str(tmp_path / "w.safetensors"), toys.arrays_of(model))
    expected = toys.arrays_of(model)
    model.load_weights(str(tmp_path / "w.safetensors"))
    with failing(model) as transaction:
        for i in range(4):
            swap(transaction, f"layers.{i}", nn.ReLU())
    assert all(is_lazy(layer.weight) for layer in model.layers)
    assert toys.same_arrays(expected, toys.arrays_of(model))


def test_a_lazily_loaded_weight_is_not_written_anywhere(tmp_path: Path) -> None:
    model = wide(1)
    mx.save_safetensors(str(tmp_path / "w.safetensors"), toys.arrays_of(model))
    model.load_weights(str(tmp_path / "w.safetensors"))
    spill = tmp_path / "spill"
    spill.mkdir()
    with Transaction(WalkedModel(model), folder=spill) as transaction:
        swap(transaction, "layers.0", nn.ReLU())
        assert list(spill.iterdir()) == []


def test_tied_weights_are_tied_again() -> None:
    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96, bias=False))
    model.layers[1].weight = model.layers[0].weight
    with failing(model) as transaction:
        swap(transaction, "layers.0", nn.ReLU())
        swap(transaction, "layers.1", nn.ReLU())
    assert model.layers[0].weight is model.layers[1].weight


def test_a_module_in_two_places_is_one_again() -> None:
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, layer)
    before = toys.arrays_of(layer)
    del layer
    with failing(model) as transaction:
        swap(transaction, "layers.0", nn.ReLU())
        swap(transaction, "layers.1", nn.ReLU())
    assert model.layers[0] is model.layers[1]
    assert toys.same_arrays(before, toys.arrays_of(model.layers[0]))


def test_a_module_that_somebody_holds_comes_back_itself() -> None:
    model = wide(1)
    held = model.layers[0]
    with failing(model) as transaction:
        swap(transaction, "layers.0", nn.ReLU())
    assert model.layers[0] is held


def test_frozen_sets_and_training_flags_come_back() -> None:
    model = wide(1)
    model.layers[0].freeze()
    model.layers[0]._training = False
    with failing(model) as transaction:
        swap(transaction, "layers.0", nn.ReLU())
    assert model.layers[0]._no_grad == {"weight"}
    assert model.layers[0].training is False


def test_originals_and_the_reference_can_be_read_meanwhile() -> None:
    model = toys.llama()
    x = toys.tokens()
    expected = model(x)
    before = toys.arrays_of(model)
    with Transaction(WalkedModel(model)) as transaction:
        for path in ("model.embed_tokens", "model.layers.0.mlp.up_proj"):
            swap(transaction, path, site_at(transaction, path).module.to_quantized(64, 2))
        assert not mx.array_equal(model(x), expected).item()
        reference = transaction.reference()
        assert mx.array_equal(reference(x), expected).item()
        assert toys.same_arrays(before, toys.arrays_of(reference))
        up = transaction.original(site_at(transaction, "model.layers.0.mlp.up_proj"))
        assert mx.array_equal(up.weight, before["model.layers.0.mlp.up_proj.weight"]).item()
        assert (
            transaction.original(site_at(transaction, "model.layers.1.mlp.up_proj"))
            is model.model.layers[1].mlp.up_proj
        )
        assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)


def test_a_full_disk_keeps_the_originals_in_memory_and_says_so(monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))
    model = wide(2)
    before = toys.arrays_of(model)
    with failing(model, kept_bytes=0) as transaction:
        quantize_all(transaction)
        assert len(transaction.notes) == 1
        assert "stayed in memory" in transaction.notes[0]
    assert toys.same_arrays(before, toys.arrays_of(model))


@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_originals_stay_in_memory_as_far_as_there_is_room(kept: int, tmp_path: Path) -> None:
    model = wide(4)
    before = toys.arrays_of(model)
    size = model.layers[0].weight.nbytes
    with failing(model, folder=tmp_path, kept_bytes=kept * size + size // 2) as transaction:
        quantize_all(transaction)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 4 - kept
        assert toys.same_arrays(before, toys.arrays_of(transaction.reference()))
    assert toys.same_arrays(before, toys.arrays_of(model))


@pytest.mark.parametrize(("backend", "share"), [("cpu", 0), ("metal", 0), ("cuda", 4)])
def test_only_a_card_keeps_originals(backend: str, share: int, monkeypatch) -> None:
    held = mx.get_active_memory()
    monkeypatch.setattr(transaction_module, "backend", lambda: backend)
    monkeypatch.setattr(transaction_module, "memory_budget", lambda: held + 4_000_000)
    monkeypatch.setattr(mx, "get_active_memory", lambda: held)
    assert transaction_module.room_for_originals() == (4_000_000 // share if share else 0)
    monkeypatch.setattr(transaction_module, "memory_budget", lambda: held - 4_000_000)
    assert transaction_module.room_for_originals() == 0


def test_a_temporary_folder_in_memory_is_in_the_notes(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transaction_module, "in_memory", lambda folder: folder == tmp_path)
    with Transaction(WalkedModel(wide()), folder=tmp_path, kept_bytes=0) as transaction:
        quantize_all(transaction)
        assert [f"set aside in {tmp_path}, which lies in memory itself" in note for note in transaction.notes] == [True]


def test_the_folder_is_made_only_when_needed() -> None:
    found = set(Path(tempfile.gettempdir()).glob("mlx_tune-originals-*"))
    with Transaction(WalkedModel(wide(1))):
        pass
    assert set(Path(tempfile.gettempdir()).glob("mlx_tune-originals-*")) <= found
