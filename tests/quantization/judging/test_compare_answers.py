import json
import math

import mlx.core as mx
import numpy as np
import pytest
import quantization_toys as toys
from token_figures import logits, reference_figures

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.judging.compare_answers import compare_outputs, compare_tokens, quick_divergences
from mlx_tune.quantization.judging.summaries import summarise_outputs, summarise_tokens


def test_token_figures_are_those_of_numpy_in_float64() -> None:
    x, y, targets = logits(0), logits(0) + 0.1 * logits(1), toys.tokens(3, 7, 50)
    found = compare_tokens(x, y, targets, 5)
    for name, expected in reference_figures(np.array(x), np.array(y), np.array(targets)).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=2e-4, atol=2e-6, err_msg=name)
    np.testing.assert_array_equal(found.sequence, np.repeat([5, 6, 7], 7))
    assert found.finite.all()


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
def test_small_and_large_divergences_are_those_of_numpy(size: float) -> None:
    x = logits(0, (2, 8, 20_000))
    y = x + size * logits(1, x.shape) / 3
    found = compare_tokens(x, y, toys.tokens(2, 8, 20_000), 0)
    expected = reference_figures(np.array(x), np.array(y), np.array(toys.tokens(2, 8, 20_000)))
    np.testing.assert_allclose(found.kl, expected["kl"], rtol=1e-3)
    np.testing.assert_allclose(found.reverse_kl, expected["reverse_kl"], rtol=1e-3)


def test_tokens_that_one_model_rules_out() -> None:
    x, y, targets = np.array(logits(0)), np.array(logits(1)), toys.tokens(3, 7, 40)
    x[..., -1] = -np.inf
    found = compare_tokens(mx.array(x), mx.array(y), targets, 0)
    expected = reference_figures(x[..., :-1], y[..., :-1], np.array(targets))["kl"]
    # The reference gives the last token no probability, so it counts only in what the model has left for the rest.
    rest = y.astype(np.float64) - y.max(-1, keepdims=True)
    expected = expected - np.log(np.exp(rest[..., :-1]).sum(-1) / np.exp(rest).sum(-1)).reshape(-1)
    np.testing.assert_allclose(found.kl, expected, rtol=1e-4)
    assert np.isinf(found.reverse_kl).all()


def test_long_logits_are_cut_without_a_seam(monkeypatch) -> None:
    x, y, targets = logits(0), logits(1), toys.tokens(3, 7, 50)
    whole = compare_tokens(x, y, targets, 0)
    monkeypatch.setattr("mlx_tune.quantization.judging.compare_answers.LOGITS_AT_ONCE", 4 * 50 * 4)
    cut = compare_tokens(x, y, targets, 0)
    np.testing.assert_allclose(whole.kl, cut.kl, rtol=1e-6)


def test_equal_logits_cost_nothing() -> None:
    found = summarise_tokens(compare_tokens(logits(0), logits(0), toys.tokens(3, 7, 50), 0))
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.same_top == 1
    assert found.perplexity_ratio == 1


def test_tokens_that_are_not_finite_are_left_out_and_counted() -> None:
    y = np.array(logits(1))
    y[0, 0, 3] = np.nan
    y[1, 2, 3] = np.inf
    found = summarise_tokens(compare_tokens(logits(0), mx.array(y), toys.tokens(3, 7, 50), 0))
    assert found.non_finite == pytest.approx(2 / 21)
    assert found.tokens == 19
    assert math.isfinite(found.mean_kl)
    assert "left out" in found.warnings[0]
    assert "Warning: " in str(found)


def test_masked_tokens_are_no_fault() -> None:
    x, y = np.array(logits(0)), np.array(logits(1))
    x[..., -1] = y[..., -1] = -np.inf
    found = summarise_tokens(compare_tokens(mx.array(x), mx.array(y), toys.tokens(3, 7, 40), 0))
    assert found.non_finite == 0
    expected = reference_figures(x[..., :-1], y[..., :-1], np.array(toys.tokens(3, 7, 40)))
    assert found.mean_kl == pytest.approx(expected["kl"].mean(), rel=1e-4)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(QuantizationError, match="differ in shape"):
        compare_tokens(logits(0), logits(0)[..., :-1], toys.tokens(3, 7, 40), 0)


def test_output_figures_are_those_of_numpy() -> None:
    pairs = [([logits(i), logits(i + 5)], [logits(i) * 1.01, logits(i + 5) + 0.1]) for i in range(3)]
    found = summarise_outputs([compare_outputs(a, b) for a, b in pairs])
    flat = [tuple(np.concatenate([np.array(v).ravel() for v in side]).astype(np.float64) for side in p) for p in pairs]
    errors = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in flat]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in flat]
    whole = math.sqrt(sum(np.sum((a - b) ** 2) for a, b in flat) / sum(np.sum(a**2) for a, b in flat))
    assert found.relative_error == pytest.approx(whole, rel=1e-5)
    assert found.worst_relative_error == pytest.approx(max(errors), rel=1e-5)
    assert found.cosine == pytest.approx(np.mean(cosines), rel=1e-6)
    assert found.worst_cosine == pytest.approx(min(cosines), rel=1e-6)
    assert found.values == 3 * 2 * 3 * 7 * 50
    assert json.loads(json.dumps(found.to_dict()))["kind"] == "outputs"
    assert "cosine" in str(found)


@pytest.mark.parametrize("moved", [1e-4, 0.03, 1.0, 5.0, 60.0])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_divergences_alone_are_those_among_all_figures(moved: float, offset: float) -> None:
    mx.random.seed(0)
    x = 3 * mx.random.normal((2, 8, 96))
    y = x + moved * mx.random.normal(x.shape) + offset  # one offset for all logits of a token says nothing
    found = np.array(quick_divergences(x, mx.softmax(x, axis=-1), y), dtype=np.float64)
    wanted = compare_tokens(x, y, mx.zeros((2, 8), dtype=mx.int32), 0).kl
    known = np.isfinite(found)
    assert known.all() or moved > 50  # exp() of that leaves float32's range: no number, and never a wrong one
    assert found[known] == pytest.approx(wanted[known], rel=2e-3 if moved < 0.01 else 2e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_divergences_alone_are_no_numbers_where_logits_are_none(bad: float) -> None:
    x = mx.random.normal((1, 2, 8))
    y = mx.array(x)
    y[0, 1, 3] = bad
    for before, after in ((x, y), (y, x)):
        found = quick_divergences(before, mx.softmax(before, axis=-1), after)
        assert not math.isfinite(found[1].item())
        assert math.isfinite(found[0].item())
