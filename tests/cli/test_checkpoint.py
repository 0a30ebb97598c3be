from __future__ import annotations

import json

import pytest

from mlx_tune.checkpointing import GradientDifference, VerifyReport


def test_checkpoint_plans(tool) -> None:
    code, out, _ = tool("checkpoint", "--batch-size", "4", "--memory-budget", "1GB", "--json")
    answer = json.loads(out)
    assert code == 0
    assert len(answer["blocks"]) == 3


def test_checkpoint_verifies(tool) -> None:
    code, out, _ = tool("checkpoint", "--verify", "--batch-size", "1", "--max-seq-length", "33")
    assert code == 0
    assert out.startswith("3 checkpointed blocks against none")


@pytest.mark.parametrize(
    ("difference", "reason", "expected"), [(0.0, "", 0), (1.0, "", 1), (0.0, "the gradient is zero both ways", 3)]
)
def test_checkpoint_verify_has_an_exit_code_for_each_verdict(
    tool, monkeypatch, difference: float, reason: str, expected: int
) -> None:
    row = GradientDifference("w", 1.0, difference, 0.0, 1e-6, False, reason)
    report = VerifyReport(("layers.0",), 2.0, 0.0, 1e-6, (row,))
    monkeypatch.setattr("mlx_tune.lm.fitting.verify_checkpoint", lambda *_: report)
    code, out, _ = tool("checkpoint", "--verify", "--json")
    assert code == expected
    assert json.loads(out)["verdict"] == report.verdict
