"""Figures and steps of several ranks: the largest count, and none goes on alone."""

import mlx.core as mx
import pytest

from mlx_tune.errors import TrialError
from mlx_tune.measuring.ranks import Ranks
from mlx_tune.measuring.step import StepTrial


class WithOther(Ranks):
    """A rank whose one companion answers each exchange with the next of these rows."""

    def __init__(self, *rows):
        self.group, self.rank, self.size, self.rows = None, 0, 2, list(rows)

    def _gather(self, row):
        other = self.rows.pop(0)
        assert len(other) == len(row)
        return [list(row), other]


FINE = [0]


@pytest.mark.parametrize(("own", "other"), [(2.5, 3.25), (3.25, 2.5), (80e9, 24e9)])
def test_the_largest_figure_counts(own, other):
    assert WithOther(FINE, [round(other * 1e6)]).largest_figure(lambda: own) == max(own, other)


def test_the_highest_peak_and_the_longest_time_count():
    ranks = WithOther([0, 0, 500, 2_000_000, 0])
    assert ranks.step(lambda: StepTrial(1000, 700, 1.0)) == StepTrial(1000, 700, 2.0)


def test_a_fault_on_one_rank_is_everybodys():
    ranks = WithOther([0, 0, 500, 2_000_000, 1])
    assert "on another rank" in ranks.step(lambda: StepTrial(1000, 700, 1.0)).fault


def test_out_of_memory_on_one_rank_is_everybodys():
    with pytest.raises(MemoryError, match="on another rank"):
        WithOther([0, 1, 0, 0, 0]).step(lambda: StepTrial(1000, 700, 1.0))

    def dies():
        raise MemoryError("here")

    with pytest.raises(MemoryError, match="here"):
        WithOther([0, 0, 500, 1, 0]).step(dies)


def test_another_error_on_one_rank_stops_the_other():
    with pytest.raises(TrialError, match="Rank 1 raised"):
        WithOther([1, 0, 0, 0, 0]).step(lambda: StepTrial(1000, 700, 1.0))


def test_one_alone_agrees_with_itself(monkeypatch):
    monkeypatch.setenv("MLX_RANK", "0")
    assert Ranks.alone().step(lambda: StepTrial(None, 7, 1.5)) == StepTrial(None, 7, 1.5)


def test_figures_travel_on_the_stream_that_the_group_chooses(monkeypatch):
    """NCCL has no way to send from the processor's streams, and other backends no other."""
    sent = []

    def all_gather(x, **options):
        sent.append(options)
        return mx.concatenate([x, x])

    monkeypatch.setattr(mx.distributed, "all_gather", all_gather)
    ranks = Ranks.alone()
    ranks.size = 2
    assert ranks.largest(7) == 7
    assert [options.keys() for options in sent] == [{"group"}]
