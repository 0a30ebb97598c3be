"""What a store of packed layers leaves for the next call, and what it refuses to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mlx_tune as mt
from mlx_tune.lm.quantizing.folder_store import FolderStore
from mlx_tune.quantization.build_report import LayerOutcome

SHARDS = {
    "one.safetensors": {"a.weight": mx.zeros((2, 4)), "a.bias": mx.zeros(2)},
    "two.safetensors": {"b": mx.zeros(3)},
}
OUTCOME = LayerOutcome("a", "optimal", float("inf"), note="a remark")


def test_what_was_done_is_there_for_the_next_call(tmp_path: Path) -> None:
    with FolderStore(tmp_path, SHARDS, {"bits": "4"}) as store:
        assert (store.outcomes, store.energies) == ({}, None)
        store.remember(({"a": mx.array([0.5, 2.0])}, ("a note",)))
        store.write("a.weight", mx.ones((2, 4)))
        store.finish(OUTCOME)
    again = FolderStore(tmp_path, SHARDS, {"bits": "4"})
    assert again.outcomes == {"a": OUTCOME}
    assert again.energies is not None
    energies, notes = again.energies
    assert {path: energy.tolist() for path, energy in energies.items()} == {"a": [0.5, 2.0]}
    assert notes == ("a note",)
    with again:
        again.write("b", mx.ones(3))
        again.flush()
    one: Any = mx.load(str(again.folder / "one.safetensors"))
    two: Any = mx.load(str(again.folder / "two.safetensors"))
    assert (one["a.weight"].tolist(), one["a.bias"].tolist(), two["b"].tolist()) == ([[1] * 4] * 2, [0, 0], [1, 1, 1])


def test_no_energies_are_known_too(tmp_path: Path) -> None:
    with FolderStore(tmp_path, SHARDS, {}) as store:
        store.remember(({}, ()))
    assert FolderStore(tmp_path, SHARDS, {}).energies == ({}, ())


def test_another_task_is_refused_and_nothing_touched(tmp_path: Path) -> None:
    with FolderStore(tmp_path, SHARDS, {"bits": "4"}) as store:
        store.remember(({}, ()))
        store.finish(OUTCOME)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(mt.InvalidArgumentError, match=r"another task: bits was 4, now it is 3\. Delete that folder"):
        FolderStore(tmp_path, SHARDS, {"bits": "3"})
    with pytest.raises(mt.InvalidArgumentError, match="another task: layout was"):
        FolderStore(tmp_path, {"one.safetensors": SHARDS["one.safetensors"]}, {"bits": "4"})
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_folder_that_was_damaged_is_refused(tmp_path: Path) -> None:
    with FolderStore(tmp_path, SHARDS, {}) as store:
        store.finish(OUTCOME)
    (store.folder / "two.safetensors").write_bytes(b"")
    with pytest.raises(mt.InvalidArgumentError, match="lacks files that its journal tells of"):
        FolderStore(tmp_path, SHARDS, {})
    (tmp_path / "journal.jsonl").write_text("nonsense\n")
    with pytest.raises(mt.InvalidArgumentError, match="journal that cannot be read"):
        FolderStore(tmp_path, SHARDS, {})
