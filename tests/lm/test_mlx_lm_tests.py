"""The script that runs mlx-lm's own tests with checkpoints, on a test file of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "benchmarks" / "mlx_lm_tests.py"

THEIRS = """
import unittest
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_tune import is_checkpointed

def model():
    args = llama.ModelArgs("llama", 16, 2, 32, 2, 1e-5, 32)
    return llama.Model(args)

class TestTheirs(unittest.TestCase):
    def test_backward(self):
        loss, _ = nn.value_and_grad(one := model(), lambda m, x: m(x).sum())(one, mx.array([[1, 2]]))
        self.assertTrue(mx.isfinite(loss).item())

    def test_blocks_are_plain(self):
        self.assertFalse(is_checkpointed(model().layers[0]))

    def test_that_fails(self):
        self.assertTrue(False)
"""


@pytest.mark.slow
def test_what_passes_plain_and_not_checkpointed_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(THEIRS)
    words = [sys.executable, str(SCRIPT), "--tests", str(tmp_path), "--json", str(tmp_path / "out"), "test_theirs.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    answer = json.loads((tmp_path / "out").read_text())
    name = "test_theirs.TestTheirs.test_"
    assert answer["plain"] == {
        f"{name}backward": "passed",
        f"{name}blocks_are_plain": "passed",
        f"{name}that_fails": "failed",
    }
    assert answer["checkpointed"] == answer["plain"] | {f"{name}blocks_are_plain": "failed"}
    assert answer["worse"] == [f"{name}blocks_are_plain"]
    assert (answer["models"], answer["blocks"]) == (2, 4)
    assert f"passed plain and not checkpointed: {name}blocks_are_plain" in done.stdout
