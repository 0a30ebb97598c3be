import mlx.core as mx
import pytest

from mlx_tune.quantization.formats.packed_arrays import signal_to_noise_db_between


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_decibels_do_not_depend_on_the_size_of_the_weights(size: float) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(0))
    assert signal_to_noise_db_between(weight * size, weight * size * 1.1) == pytest.approx(20, abs=1e-3)
