import mlx.core as mx
import numpy as np
import pytest

from mlx_tune.quantization.learning.curvature import DAMPING, Curvature
from mlx_tune.quantization.learning.drift_correction import OutputErrors, corrected
from mlx_tune.quantization.learning.moments import Drift


def test_a_corrected_weight_goes_half_way_to_the_least_squares_solution():
    rng = np.random.default_rng(1)
    before = rng.normal(size=(500, 32)) @ rng.normal(size=(32, 32))
    now = before + 0.3 * rng.normal(size=before.shape)
    w, d = rng.normal(size=(4, 32)), before - now
    solution = np.linalg.lstsq(now, before @ w.T, rcond=None)[0].T
    damping = np.linalg.norm(now) ** 2 / 32 * DAMPING
    solution = w + np.linalg.solve(now.T @ now + damping * np.eye(32), now.T @ d @ w.T).T
    found = corrected(mx.array(w), Curvature(mx.array(now.T @ now), 32), Drift(mx.array(d.T @ now)))
    np.testing.assert_allclose(np.array(found), (w + solution) / 2, rtol=1e-3, atol=1e-3)


def test_the_error_with_drift_is_that_of_the_outputs():
    rng = np.random.default_rng(2)
    before, w = rng.normal(size=(100, 32)), rng.normal(size=(4, 32))
    now, v = before + 0.1 * rng.normal(size=before.shape), w + 0.1 * rng.normal(size=w.shape)
    d = before - now
    moved = Drift(mx.array(d.T @ now), mx.array(d.T @ d))
    found = OutputErrors(mx.array(w), mx.array(now.T @ now), moved).of(mx.array(v))
    wanted = np.square(now @ v.T - before @ w.T).sum() / np.square(before @ w.T).sum()
    assert found == pytest.approx(wanted, rel=1e-4)
