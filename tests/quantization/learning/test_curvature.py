import mlx.core as mx
import numpy as np
import pytest

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.learning import curvature as module
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


@pytest.mark.parametrize("columns", [32, 96, 352, 1056])
@pytest.mark.parametrize("decay", [0.0, 2.0], ids=["alike", "far apart"])
def test_a_factor_in_halves_is_as_exact_as_one_in_a_piece(columns, decay, monkeypatch):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2 * columns, columns)) * np.arange(1, columns + 1) ** -decay
    hessian = mx.array((x.T @ x).astype(np.float32))
    monkeypatch.setattr(module, "computes_on_cpu", lambda: False)

    def error(at_once):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        curvature = Curvature(hessian, 32)
        upper, damped = (np.array(a, dtype=np.float64) for a in (curvature.feedback, curvature.damped))
        assert np.all(np.tril(upper, -1) == 0)
        inverse = np.linalg.inv(damped)
        return np.abs(upper.T @ upper - inverse).max() / np.abs(inverse).max()

    assert error(32) <= 3 * error(4096) + 1e-6


def test_what_has_no_factor_is_refused_in_whatever_pieces(monkeypatch):
    monkeypatch.setattr(module, "computes_on_cpu", lambda: False)
    for at_once in (16, 4096):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        h = mx.eye(96)
        h[70, 70] = -900.0
        with pytest.raises(QuantizationError, match="cannot be factorised"):
            Curvature(h, 32)
