import pytest
from planted_kernels import Planted

from mlx_tune.quantization.planning import kernel_trials


@pytest.fixture
def plant(monkeypatch):
    """A function that puts faulty kernels in MLX's place for a test."""

    def put(**spoilt):
        planted = Planted(**spoilt)
        monkeypatch.setattr(kernel_trials, "MLX", planted.kernels)
        return planted

    return put
