from __future__ import annotations

import json

import mlx.optimizers as optim
import pytest

from mlx_tune import lm


def test_the_result_says_what_the_run_did(toy, rows, arguments) -> None:
    result = lm.train(toy(lora=True), optim.SGD(1e-2), rows, rows[:8], arguments(grad_accumulation_steps=2))
    assert (result.iterations, result.batch_size, result.accumulation_steps, result.ranks) == (4, 4, 2, 1)
    assert result.peak_bytes > 0
    assert result.footprint_bytes > result.cache_bytes >= 0
    assert result.tokens == result.losses[-1].tokens > 0
    assert result.tokens_per_second > 0
    assert [line.iteration for line in result.losses] == [2, 4]
    assert [line.iteration for line in result.validation_losses] == [0, 1, 3]
    assert result.limit_bytes is None
    assert result.fit is None
    assert result.loss_at(0) == result.losses[0].loss
    assert result.loss_at(10**9) == result.losses[-1].loss
    assert json.loads(json.dumps(result.to_dict()))["batch_size"] == 4
    text = str(result)
    assert "4 iterations of 4 rows x 2 = 8 an update" in text
    assert "0 blocks checkpointed; not wired: " in text
    assert "validation" in text


pytestmark = pytest.mark.usefixtures("adapters_exist")
