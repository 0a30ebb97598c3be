import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_tune.quantization.judging.statistics import (
    CONFIDENCE_EDGES,
    by_confidence,
    clustered_mean,
    exponential,
    overlap,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), st.integers(0, 2**31))
def test_clustered_error_is_the_sandwich(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(len(sizes)) * 7, sizes)
    values = rng.normal(size=clusters.size) + clusters
    found = clustered_mean(values, clusters)
    # The regression of the values on a constant: (X'X)^-1 (sum of X_c' u_c u_c' X_c) (X'X)^-1.
    residuals = values - values.mean()
    meat = sum(np.outer(residuals[clusters == c], residuals[clusters == c]).sum() for c in set(clusters))
    variance = meat / values.size**2 * len(sizes) / (len(sizes) - 1)
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(math.sqrt(variance))


def test_of_single_values_it_is_the_usual_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert clustered_mean(values, np.arange(50)).error == pytest.approx(values.std(ddof=1) / math.sqrt(50))


def test_copies_of_tokens_add_no_certainty() -> None:
    values = np.random.default_rng(0).normal(size=20)
    once = clustered_mean(values, np.arange(20))
    tenfold = clustered_mean(np.repeat(values, 10), np.repeat(np.arange(20), 10))
    assert tenfold.error == pytest.approx(once.error)


def test_one_sequence_has_no_error() -> None:
    found = clustered_mean(np.ones(4), np.zeros(4, dtype=np.int64))
    assert found.mean == 1
    assert math.isnan(found.error)
    assert found.to_dict() == {"mean": 1.0, "error": None}
    assert str(found) == "1"
    assert math.isnan(clustered_mean(np.array([]), np.array([], dtype=np.int64)).mean)


def test_exponential_carries_the_error_to_first_order() -> None:
    found = exponential(clustered_mean(np.array([1.0, 1.1]), np.array([0, 1])))
    assert found.mean == pytest.approx(math.exp(1.05))
    assert found.error == pytest.approx(math.exp(1.05) * 0.05)
    assert exponential(clustered_mean(np.array([1e4]), np.array([0]))).mean == math.inf


def test_buckets_hold_every_token_once() -> None:
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.uniform(size=100), CONFIDENCE_EDGES])
    kl, same = rng.exponential(size=confidence.size), rng.integers(0, 2, confidence.size).astype(float)
    buckets = by_confidence(confidence, kl, same)
    assert sum(b.tokens for b in buckets) == confidence.size
    assert sum(b.tokens * b.mean_kl for b in buckets if b.tokens) == pytest.approx(kl.sum())
    first = confidence < CONFIDENCE_EDGES[1]
    assert buckets[0].mean_kl == pytest.approx(kl[first].mean())
    assert buckets[0].same_top == pytest.approx(same[first].mean())
    empty = by_confidence(np.array([0.1]), np.array([1.0]), np.array([1.0]))[-1]
    assert empty.tokens == 0
    assert empty.to_dict()["mean_kl"] is None


def test_overlap_finds_shifted_copies() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 8000, size=4096)
    other = rng.integers(0, 8000, size=(8, 256))
    calibration = [text[: 8 * 256].reshape(8, 256)]
    assert overlap([other], calibration) == 0
    shifted = text[5 : 5 + 7 * 256].reshape(7, 256)
    assert overlap([shifted], calibration) > 0.8
    half = np.concatenate([shifted, other[:7]])
    assert 0.4 < overlap([half], calibration) < 0.5


def test_overlap_of_short_rows() -> None:
    rows = np.arange(30).reshape(3, 10)
    assert overlap([rows], [rows]) == 1
    assert overlap([rows[:, :2]], [rows]) == 0
