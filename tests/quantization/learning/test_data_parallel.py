import mlx.core as mx
import pytest

from mlx_tune.quantization.learning.data_parallel import Shares
from mlx_tune.quantization.models.batches import read_batches


class Group:
    """As much of an `mx.distributed` group as a share asks for."""

    def __init__(self, rank, size):
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


def batch_of(array):
    return read_batches([array], "calibration")[0]


def shares(batch, ranks, **how):
    return [Shares(Group(rank, ranks)).of(batch, **how) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_share_all_rows_once_and_their_weights_are_one(ranks):
    rows = mx.arange(5 * 4).reshape(5, 4)
    dealt = shares(batch_of(rows), ranks)
    seen = [row for share in dealt if share.batch is not None for row in share.batch.tokens.tolist()]
    assert sorted(seen) == rows.tolist()
    assert sum(share.weight for share in dealt) == pytest.approx(1)
    assert {share.size for share in dealt} == {20}
    for share in dealt:
        assert share.weight == pytest.approx(0 if share.batch is None else share.batch.tokens.size / 20)


@pytest.mark.parametrize("how", [{"divide": False}, {}])
def test_what_cannot_be_divided_is_done_by_all(how):
    batch = batch_of(mx.zeros((6, 4), mx.int32) if how else mx.zeros((6, 4)))
    for share in shares(batch, 3, **how):
        assert share.batch is batch
        assert share.weight == pytest.approx(1 / 3)


def test_one_process_alone_averages_over_itself():
    alone = Shares(Group(0, 1))
    batch = batch_of(mx.zeros((2, 4), mx.int32))
    loss, gradients = alone.mean(alone.of(batch), mx.array(2.0), {"w": mx.ones(3)})
    assert (loss.item(), gradients["w"].tolist(), alone.total(1.5)) == (2.0, [1.0] * 3, 1.5)
