"""Several ranks: one answer, and nobody waits for a rank that has raised.

Two processes show it for real. The rest is shown by threads that exchange rows as processes do, each row's length
being the same everywhere: a rank that asks for another exchange than the others would hang, and here it fails.
"""

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launching import launched

from mlx_tune.batching.journal import Journal
from mlx_tune.batching.journal_lines import started
from mlx_tune.batching.result import Trial
from mlx_tune.batching.shared_runner import SharedRunner
from mlx_tune.batching.sizes import agreed_sizes
from mlx_tune.errors import InvalidArgumentError, TraceError, TrialError
from mlx_tune.measuring.floors import Floor
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.memory import MemoryBudget

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
    done = subprocess.run(launched(str(script)), capture_output=True, text=True, timeout=240, check=False)
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


class Threads(Ranks):
    """A rank that is a thread."""

    def __init__(self, rank, barrier, board):
        self.group, self.rank, self.size = None, rank, len(board)
        self.barrier, self.board = barrier, board

    def _gather(self, row):
        self.board[self.rank] = list(row)
        self.barrier.wait()
        rows = [list(row) for row in self.board]
        self.barrier.wait()
        assert len({len(row) for row in rows}) == 1, f"different exchanges met: {rows}"
        return rows


def together(work, size=2):
    """What `work(ranks)` returned or raised on each rank."""
    barrier, board = threading.Barrier(size, timeout=20), [None] * size

    def on(rank):
        try:
            return work(Threads(rank, barrier, board))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(on, range(size)))


def test_the_smallest_data_set_decides():
    sizes = together(lambda ranks: agreed_sizes(ranks, 1, [64, 48][ranks.rank], 4, None))
    assert sizes == [range(4, 49, 4)] * 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            [(1, None, 1, None), (1, None, 2, None)],
            r"multiple_of=[12] here, on rank [01], and something else on rank [10]: give the same",
        ),
        ([(1, None, 1, 64), (1, None, 1, None)], r"target_batch=(64|None) here, on rank [01]"),
    ],
)
def test_what_would_lead_ranks_apart_is_refused_on_all(arguments, text):
    errors = together(lambda ranks: agreed_sizes(ranks, *arguments[ranks.rank]))
    for error in errors:
        with pytest.raises(InvalidArgumentError, match=text):
            raise error


def test_a_bad_argument_on_one_rank_stops_the_other():
    first, second = together(lambda ranks: agreed_sizes(ranks, [1, 0][ranks.rank], None, 1, None))
    assert isinstance(first, TrialError)
    assert str(second) == "min_batch=0: give a whole number of at least 1."


class Counting:
    """A runner on which everything fits, and that counts."""

    def __init__(self, fits=True):
        self.tried, self.fits = [], fits

    def trial(self, size, predicted_bytes, steps):
        self.tried.append(size)
        return [Trial(size, predicted_bytes, limit_bytes=900, peak_bytes=10 * size, steps=steps, fits=self.fits)]


def journal(path, runner):
    note = Journal(path, asked="1kB", resolved=MemoryBudget(1000))
    note.runner = runner
    return note


@pytest.mark.parametrize(
    ("known", "fits", "tried"),
    [([4, 4], True, [[], []]), ([4, None], True, [[4], [4]]), ([None, "died"], False, [[], []])],
    ids=["all know", "one knows", "one did not survive"],
)
def test_a_journal_counts_where_every_rank_has_it_or_one_says_no(tmp_path, known, fits, tried):
    """A rank that skipped a step which another runs would leave that one waiting in its exchange."""
    for rank, what in enumerate(known):
        if what == 4:
            journal(tmp_path / f"{rank}", Counting()).trial(4, None, 2)
        elif what == "died":
            journal(tmp_path / f"{rank}", Counting())._write(started(4))
    runners = [Counting(), Counting()]

    def search(ranks):
        note = journal(tmp_path / f"{ranks.rank}", runners[ranks.rank])
        return SharedRunner(note, ranks, note).trial(4, None, 2)[-1]

    trials = together(search)
    assert [trial.fits for trial in trials] == [fits, fits]
    assert [runner.tried for runner in runners] == tried
    if not fits:
        assert trials[0].reason == "the journal of rank 1 says that it does not fit"
        assert trials[1].reason == "an earlier search did not survive this trial"


def test_a_size_fits_only_where_it_fits_on_every_rank():
    trials = together(lambda ranks: SharedRunner(Counting(fits=ranks.rank == 0), ranks).trial(4, None, 2)[-1])
    assert [trial.fits for trial in trials] == [False, False]
    assert trials[0].reason == "it does not fit on rank 1"


def test_an_error_in_a_trial_reaches_every_rank():
    class Broken(Counting):
        def trial(self, size, predicted_bytes, steps):
            raise ValueError("mine")

    first, second = together(lambda ranks: SharedRunner([Counting(), Broken()][ranks.rank], ranks).trial(4, None, 2))
    assert isinstance(first, TrialError)
    assert isinstance(second, ValueError)


def test_every_rank_goes_by_the_largest_estimate():
    assert together(lambda ranks: ranks.largest_floor(lambda n: Floor(n * (1 + ranks.rank)))(10)) == [Floor(20)] * 2


def test_one_rank_that_cannot_be_read_leaves_all_without_an_estimate():
    def estimate(ranks):
        def own(size):
            if ranks.rank:
                raise TraceError("it evaluates")
            return Floor(size)

        return ranks.largest_floor(own)(10)

    assert [str(error) for error in together(estimate)] == ["another rank's step cannot be traced", "it evaluates"]


def test_isolated_ranks_share_the_first_ones_readings():
    readings = [{1: 100, 8: 170}, {1: 90, 8: 160, 64: 700}]
    assert together(lambda ranks: ranks.first_knots(lambda: readings[ranks.rank])) == [readings[0]] * 2


def test_what_is_true_anywhere_is_true_on_all():
    assert together(lambda ranks: ranks.any(lambda: ranks.rank == 1)) == [True, True]
    assert together(lambda ranks: ranks.any(lambda: False)) == [False, False]


def test_one_process_alone_agrees_with_itself():
    ranks = Ranks()
    assert ranks.size == 1
    assert ranks.agree(lambda: 3) == 3
    assert ranks.smallest(7) == 7
    with pytest.raises(ValueError, match="mine"):
        ranks.agree(lambda: [][0] if False else (_ for _ in ()).throw(ValueError("mine")))
