from __future__ import annotations

import json


def test_autobatch_prints_the_answer_and_nothing_else_as_json(tool) -> None:
    code, out, _ = tool("autobatch", "--memory-budget", "200MB", "--max-batch", "2", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["batch_size"] == 2
    assert answer["peak_bytes"] <= answer["budget_bytes"] == 200_000_000


def test_autobatch_takes_a_slowdown(tool) -> None:
    code, _, err = tool("autobatch", "--memory-budget", "200MB", "--max-batch", "2", "--slowdown", "-1")
    assert code == 2
    assert "slowdown=-1.0: give a share of at least 0" in err
    code, out, _ = tool("autobatch", "--memory-budget", "200MB", "--max-batch", "2", "--slowdown", "0.05")
    assert code == 0
    assert out.startswith("batch size 2: ")


def test_autobatch_gives_micro_batches_of_a_target(tool) -> None:
    code, out, _ = tool("autobatch", "--memory-budget", "200MB", "--max-batch", "3", "--target-batch", "8", "--json")
    answer = json.loads(out)
    assert code == 0
    assert (answer["batch_size"], answer["accumulation_steps"]) == (2, 4)
