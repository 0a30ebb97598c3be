import mlx.core as mx
import pytest

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.models.answers import mean_loss


@pytest.mark.parametrize(
    ("value", "expected"),
    [(mx.array([1.0, 3.0]), 2.0), (2.5, 2.5), ((mx.array(1.5), mx.array(7)), 1.5), ([mx.array(4)], 4.0)],
)
def test_what_a_loss_may_give_back(value: object, expected: float) -> None:
    assert mean_loss(value).item() == expected


def test_what_a_loss_may_not_give_back() -> None:
    with pytest.raises(QuantizationError, match="loss gave back a NoneType: it must give back a number"):
        mean_loss(None)
