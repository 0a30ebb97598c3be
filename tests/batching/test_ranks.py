"""Two ranks on this machine: one answer, and nobody waits for a rank that has raised."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_tune.batching.ranks import Ranks

SCRIPT = """
import sys
sys.path[:0] = {path!r}
import mlx.core as mx
import small_steps
from mlx_tune.batching import autobatch
group = mx.distributed.init(strict=True, backend="ring")
step, make_batch, state = small_steps.build()
mode, rank = {mode!r}, group.rank()

def raising(x):
    if mode == "raise" and rank == 1 and x.shape[0] > 1:
        raise ValueError("rank one's own")
    return step(x)

try:
    budget = 6_000_000 if rank == 0 else 4_000_000
    result = autobatch(raising, make_batch, budget=budget, state=state, max_batch=6, steps=1, progress=False)
    print(f"rank {{rank}}: {{result.batch_size}} of {{result.budget_bytes}} under {{result.limit_bytes}}", flush=True)
except Exception as error:
    print(f"rank {{rank}}: {{type(error).__name__}}: {{error}}", flush=True)
"""


def launch(tmp_path, mode):
    root = Path(__file__).parents[2]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=[str(root), str(root / "tests")], mode=mode))
    launcher = Path(sys.executable).with_name("mlx.launch")
    command = [str(launcher), "-n", "2", "--backend", "ring", "--", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    lines = sorted(line[line.index("rank ") :] for line in done.stdout.splitlines() if "rank " in line)
    assert len(lines) == 2, done.stdout + done.stderr
    return lines


@pytest.mark.slow
def test_both_ranks_answer_the_same_under_the_smaller_budget(tmp_path):
    first, second = launch(tmp_path, "fine")
    assert first.removeprefix("rank 0") == second.removeprefix("rank 1")
    assert "of 4000000 under" in first


@pytest.mark.slow
def test_a_rank_that_raises_takes_the_other_along(tmp_path):
    first, second = launch(tmp_path, "raise")
    assert first.startswith("rank 0: TrialError: Rank 1 raised during the search, so rank 0 stops too")
    assert "ValueError: rank one's own" in second


def test_one_process_alone_agrees_with_itself():
    ranks = Ranks()
    assert ranks.size == 1
    assert ranks.agree(lambda: 3) == 3
    assert ranks.smallest(7) == 7
    with pytest.raises(ValueError, match="mine"):
        ranks.agree(lambda: [][0] if False else (_ for _ in ()).throw(ValueError("mine")))
