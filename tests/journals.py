"""A journal over a runner that only notes what it was asked to try."""

from mlx_tune.batching.journal import Journal
from mlx_tune.batching.result import Trial
from mlx_tune.memory import MemoryBudget

BUDGET = MemoryBudget(1000)


class Runner:
    def __init__(self, fails=()):
        self.tried, self.fails = [], fails

    def trial(self, size, predicted_bytes, steps):
        self.tried.append(size)
        if size in self.fails:
            raise KeyboardInterrupt
        return [
            Trial(size, predicted_bytes, limit_bytes=900, peak_bytes=10 * size, steps=steps, fits=10 * size <= 1000)
        ]


def journal(path, runner, asked="1kB", resolved=BUDGET):
    note = Journal(path, asked=asked, resolved=resolved)
    note.runner = runner
    return note
