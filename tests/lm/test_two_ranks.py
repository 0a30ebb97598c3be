"""Two ranks of `mlx.launch` on this machine's loopback against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from launching import launched

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("two_ranks.py")


def run(folder: Path, task: str, ranks: int) -> None:
    words = [str(SCRIPT), str(folder), task]
    words = launched(*words, ranks=ranks) if ranks > 1 else [sys.executable, *words]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_ranks_train_and_calibrate_what_one_rank_does(tmp_path: Path) -> None:
    for ranks in (1, 2):
        run(tmp_path, "train", ranks)
    one = json.loads((tmp_path / "train-0-of-1.json").read_text())
    two = json.loads((tmp_path / "train-0-of-2.json").read_text())
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["tokens"] == two["tokens"] > 0
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    weights = {name: mx.load(str(tmp_path / f"train-{name}.npz")) for name in ("0-of-1", "0-of-2", "1-of-2")}
    for path, value in weights["0-of-1"].items():
        # Ranks sum the loss of other chunks of tokens; six steps carry that rounding on. Weights move by up to 0.3.
        np.testing.assert_allclose(weights["0-of-2"][path], value, rtol=1e-4, atol=5e-6, err_msg=path)
        assert mx.array_equal(weights["0-of-2"][path], weights["1-of-2"][path]), path
    assert (one["dwq_ranks"], two["dwq_ranks"]) == (1, 2)
    np.testing.assert_allclose(two["dwq"], one["dwq"], rtol=1e-4)
    assert one["dwq"][1] < one["dwq"][0]
    weights = {name: mx.load(str(tmp_path / f"train-{name}-dwq.npz")) for name in ("0-of-1", "0-of-2", "1-of-2")}
    for path, value in weights["0-of-1"].items():
        np.testing.assert_allclose(weights["0-of-2"][path], value, rtol=1e-3, atol=1e-5, err_msg=path)
        assert mx.array_equal(weights["0-of-2"][path], weights["1-of-2"][path]), path
    assert (tmp_path / "train-0-of-2" / "adapters.safetensors").exists()
    assert not list((tmp_path / "train-1-of-2").glob("*.safetensors"))  # the first rank saves


def test_two_ranks_agree_on_a_batch_that_fits_the_smaller_budget(tmp_path: Path) -> None:
    run(tmp_path, "search", 2)
    first, second = (json.loads((tmp_path / f"search-{rank}-of-2.json").read_text()) for rank in range(2))
    assert first == second
    assert first["batch_size"] % 2 == 0
    batch_size, accumulation_steps, _, limit_bytes, budget_bytes = first["fit"]
    assert batch_size % 2 == 0
    assert batch_size * accumulation_steps == 4
    assert limit_bytes <= budget_bytes == 12_000_000
    assert "here are 2 ranks: call lm.autofit(..., min_batch=4, max_batch=4)" in first["refusal"]
