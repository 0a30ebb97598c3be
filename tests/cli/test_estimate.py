from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.parametrize("model", ["tied", "untied", "moe", "sharded"])
def test_estimate_takes_every_kind_of_folder(tool, model: str) -> None:
    code, out, _ = tool("estimate", "--batch-size", "2", model=model)
    assert code == 0
    assert out.startswith("Floor of the step: ")


def test_estimate_says_whether_it_fits(tool) -> None:
    code, out, _ = tool("estimate", "--memory-budget", "1GB")
    assert code == 0
    assert "The step fits within 1.00 GB: " in out
    code, out, _ = tool("estimate", "--memory-budget", "1MB", "--json")
    answer = json.loads(out)
    assert code == 1
    assert answer["fits"] is False
    assert answer["budget_bytes"] == 1_000_000 < answer["floor_bytes"]


def test_estimate_stands_in_for_data_that_is_not_there_yet(tool) -> None:
    floors = {}
    for length in (64, 128):
        code, out, _ = tool("estimate", "--max-seq-length", str(length), "--json", data=False)
        assert code == 0
        floors[length] = json.loads(out)["floor_bytes"]
    assert floors[128] > 1.5 * floors[64]


def test_estimate_counts_what_is_asked_for(tool) -> None:
    floors = {}
    for name, options in {
        "lora": [],
        "full": ["--fine-tune-type", "full"],
        "checkpointed": ["--grad-checkpoint"],
        "accumulated": ["--fine-tune-type", "full", "--grad-accumulation-steps", "4"],
    }.items():
        floors[name] = json.loads(tool("estimate", "--json", *options)[1])["floor_bytes"]
    assert floors["checkpointed"] < floors["lora"]
    assert floors["accumulated"] > floors["full"]


def test_estimate_prices_for_another_backend(tool) -> None:
    found = {name: json.loads(tool("estimate", "--json", "--backend", name)[1]) for name in ("cuda", "metal", "cpu")}
    assert {name: one["backend"] for name, one in found.items()} == {name: name for name in found}
    assert found["cuda"]["floor_bytes"] != found["cpu"]["floor_bytes"]
    assert "never measured on an Apple GPU" in tool("estimate", "--backend", "metal")[1].replace("\n", " ")
    assert "RMSNormVJP" in found["metal"]["operations"]


def test_estimate_draws(tool, tmp_path: Path) -> None:
    assert tool("estimate", "--plot", str(tmp_path / "memory.svg"))[0] == 0
    assert (tmp_path / "memory.svg").read_text().lstrip().startswith("<?xml")
