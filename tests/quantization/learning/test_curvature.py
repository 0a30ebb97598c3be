import mlx.core as mx
import numpy as np
import pytest

from mlx_tune.quantization.learning.curvature import DAMPING, Curvature


@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_it_is_the_damped_inverse_in_the_order_of_falling_energy(shrinkage):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, 64)) * np.linspace(0.2, 3, 64)
    h = x.T @ x
    curvature = Curvature(mx.array(h.astype(np.float32)), 32, shrinkage)
    wanted = (1 - shrinkage) * h + np.diag(shrinkage * np.diag(h) + DAMPING * np.diag(h).mean())
    order, upper = np.array(curvature.order), np.array(curvature.feedback, dtype=np.float64)
    assert curvature.groups.tolist() == [1, 0]
    assert sorted(order[:32].tolist()) == list(range(32, 64))
    assert np.all(np.diff(np.diag(h)[order[:32]]) <= 0)
    np.testing.assert_allclose(np.array(curvature.damped), wanted[order][:, order], rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(np.tril(upper, -1), 0, atol=1e-7)
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(wanted[order][:, order]), rtol=1e-2, atol=1e-5)
    right = rng.normal(size=(64, 3))
    np.testing.assert_allclose(
        np.array(curvature.solve(mx.array(right))), np.linalg.solve(wanted, right), rtol=1e-2, atol=1e-5
    )
