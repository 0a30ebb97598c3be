from __future__ import annotations

import json

import mlx.core as mx
import pytest


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("estimate", "estimate: reading the step's graph"),
        ("autobatch", "autobatch: trying batch size 1"),
        ("checkpoint", "plan checkpoints: timing model.layers.0"),
        ("fit", "autofit: largest batch with every block checkpointed"),
    ],
)
def test_who_reads_a_log_hears_what_is_going_on(tool, command: str, line: str) -> None:
    batch = ["--max-batch", "1"] if command in ("autobatch", "fit") else ["--batch-size", "1"]
    code, out, err = tool(command, "--memory-budget", "1GB", "--json", *([] if command == "estimate" else batch))
    assert code == 0
    json.loads(out)
    assert any(said.startswith(line) for said in err.splitlines())
    assert "\x1b" not in err


@pytest.mark.parametrize("command", ["autobatch", "checkpoint"])
def test_what_does_not_fit_is_bad_news_and_not_an_error(tool, command: str) -> None:
    budget = mx.get_active_memory() + 1_000_000
    code, out, err = tool(command, "--memory-budget", str(budget))
    assert code == 1
    assert out == ""
    assert "fit" in err.splitlines()[-1]
    code, out, _ = tool(command, "--memory-budget", str(budget), "--json")
    answer = json.loads(out)
    assert code == 1
    assert answer["fits"] is False
    assert answer["needed_bytes"] > answer["budget_bytes"] == budget
