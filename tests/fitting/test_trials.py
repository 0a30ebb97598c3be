"""Two ranks that fit together: the same answer on both, for the slower one."""

import json
import subprocess

import pytest
from launching import launched

from mlx_tune.errors import TrialError

SCRIPT = """
import json, sys
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_tune as mt

group = mx.distributed.init(backend="ring")
mx.random.seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
optimizer = optim.SGD(0.1)
sizes = []

def step(x):
    sizes.append(len(x))
    # The largest batch is traced once and run after that, however many steps the others took.
    if "raise" in sys.argv and group.rank() == 1 and sizes.count(64) > 1:
        raise ValueError("the user's own")
    loss, gradients = nn.value_and_grad(model, lambda model, x: model(x).square().mean())(model, x)
    optimizer.update(model, gradients)
    return loss

try:
    fit = mt.autofit(
        model, step, lambda n: mx.ones((n, 8)), budget=20_000_000 * (1 + group.rank()), max_batch=64, multiple_of=2,
        state=optimizer, progress=False, group=group,
    )
    said = [fit.batch_size, list(fit.paths), fit.limit_bytes, fit.budget_bytes]
except (mt.TrialError, ValueError) as error:
    said = type(error).__name__
open(sys.argv[1] + str(group.rank()), "w").write(json.dumps(said))
"""


def said_by_both(tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = launched(str(script), str(tmp_path / "said"), *arguments)
    subprocess.run(words, check=True, timeout=240, cwd=tmp_path, capture_output=True)
    return [json.loads((tmp_path / f"said{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_two_ranks_on_loopback_come_to_the_same_answer(tmp_path):
    first, second = said_by_both(tmp_path)
    assert first == second
    assert first[3] == 20_000_000


@pytest.mark.slow
def test_a_rank_that_raises_stops_the_other(tmp_path):
    assert said_by_both(tmp_path, "raise") == [TrialError.__name__, "ValueError"]
