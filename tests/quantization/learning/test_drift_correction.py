import mlx.core as mx
import numpy as np
import pytest

from mlx_tune.quantization.learning.curvature import DAMPING, Curvature
from mlx_tune.quantization.learning.drift_correction import OutputErrors, corrected
from mlx_tune.quantization.learning.moments import Drift


def test_a_corrected_weight_goes_three_quarters_of_the_way_to_the_least_squares_solution():
    rng = np.random.default_rng(1)
    before = rng.normal(size=(500, 32)) @ rng.normal(size=(32, 32))
    now = before + 0.3 * rng.normal(size=before.shape)
    w, d = rng.normal(size=(4, 32)), before - now
    solution = np.linalg.lstsq(now, before @ w.T, rcond=None)[0].T
    damping = np.linalg.norm(now) ** 2 / 32 * DAMPING
    solution = w + np.linalg.solve(now.T @ now + damping * np.eye(32), now.T @ d @ w.T).T
    found = corrected(mx.array(w), Curvature(mx.array(now.T @ now), 32), Drift(mx.array(d.T @ now)))
    np.testing.assert_allclose(np.array(found), (w + 3 * solution) / 4, rtol=1e-3, atol=1e-3)


def test_the_error_with_drift_is_that_of_the_outputs():
    rng = np.random.default_rng(2)
    before, w = rng.normal(size=(100, 32)), rng.normal(size=(4, 32))
    now, v = before + 0.1 * rng.normal(size=before.shape), w + 0.1 * rng.normal(size=w.shape)
    d = before - now
    moved = Drift(mx.array(d.T @ now), mx.array(d.T @ d))
    found = OutputErrors(mx.array(w), mx.array(now.T @ now), moved).of(mx.array(v))
    wanted = np.square(now @ v.T - before @ w.T).sum() / np.square(before @ w.T).sum()
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 0.7])
def test_inputs_that_became_smaller_are_made_up_for_alike_however_few_tokens_there_are(shrinkage, outliers):
    """The least-squares solution is the weight made larger, which trust in few tokens has no part in."""
    x, w = _inputs(np.random.default_rng(3), 96, outliers), np.random.default_rng(4).normal(size=(8, 128))
    now = 0.5 * x
    curvature = Curvature(mx.array(now.T @ now), 64, shrinkage)
    found = np.array(corrected(mx.array(w), curvature, Drift(mx.array((x - now).T @ now))))
    # Towards twice the weight; damping holds back where inputs are small.
    outputs = (x @ found.T * (x @ w.T)).sum() / np.square(x @ w.T).sum()
    assert outputs == pytest.approx(1.75, abs=0.02)
    assert np.linalg.norm(found - w) < 0.76 * np.linalg.norm(w)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["smaller", "turned", "noisy", "unlike"])
@pytest.mark.parametrize("outliers", [False, True])
def test_few_tokens_do_no_harm_on_others(outliers, kind, seed):
    rng = np.random.default_rng(seed)
    turn, w = 0.3 * rng.normal(size=(128, 128)) / np.sqrt(128), rng.normal(size=(16, 128))

    def moved(x, teaches=False):
        if kind == "unlike":  # such as a token that stands in one batch only
            return x + (1 if teaches else -1) * x @ turn
        return {"smaller": 0.6 * x, "turned": x - x @ turn, "noisy": x + 0.5 * rng.normal(size=x.shape)}[kind]

    def drift(before, now):
        return Drift(mx.array((before - now).T @ now))

    before, held, other = (_inputs(rng, tokens, outliers) for tokens in (96, 32, 400))
    now, held_now, other_now = moved(before, teaches=True), moved(held), moved(other)
    curvature = Curvature(mx.array(now.T @ now), 64, 0.7)
    aside = mx.array(held_now.T @ held_now), drift(held, held_now)
    found = np.array(corrected(mx.array(w), curvature, drift(before, now), *aside))

    def error(weight):
        return np.square(other_now @ weight.T - other @ w.T).sum()

    assert error(found) < 1.01 * error(w)


def _inputs(rng, tokens, outliers):
    """Correlated inputs and, if asked for, a token in 24 that is larger by far than all others."""
    mix, common = np.random.default_rng(7).normal(size=(9, 128))[:8], np.random.default_rng(8).normal(size=128)
    x = rng.normal(size=(tokens, 8)) @ mix + 0.3 * rng.normal(size=(tokens, 128)) + 2 * common
    if outliers:
        x[::24] += 300 * np.eye(128)[3] + 30 * common
    return x
