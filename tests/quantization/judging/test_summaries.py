import json
import math

import numpy as np
import pytest
import quantization_toys as toys
from token_figures import logits

from mlx_tune.quantization.judging.compare_answers import compare_tokens, join_figures
from mlx_tune.quantization.judging.summaries import summarise_losses, summarise_tokens


def test_summary_is_that_of_numpy() -> None:
    figures = [
        compare_tokens(logits(i), logits(i) + 0.2 * logits(9 + i), toys.tokens(3, 7, 50, i), 3 * i) for i in range(4)
    ]
    found = summarise_tokens(join_figures(figures), arithmetic="here")
    kl = np.concatenate([f.kl for f in figures])
    before, after = (np.concatenate([getattr(f, n) for f in figures]) for n in ("nll_before", "nll_after"))
    assert found.tokens == 4 * 21
    assert found.sequences == 12
    assert found.mean_kl == pytest.approx(kl.mean())
    assert found.median_kl == pytest.approx(np.median(kl))
    assert found.p99_kl == pytest.approx(np.percentile(kl, 99))
    assert found.p999_kl == pytest.approx(np.percentile(kl, 99.9))
    assert found.max_kl == pytest.approx(kl.max())
    assert found.perplexity_before == pytest.approx(math.exp(before.mean()))
    assert found.perplexity_after == pytest.approx(math.exp(after.mean()))
    assert found.perplexity_ratio == pytest.approx(math.exp((after - before).mean()))
    by_sequence = (after - before).reshape(12, 7).mean(1)
    error = by_sequence.std(ddof=1) / math.sqrt(12)
    assert found.perplexity_ratio_error == pytest.approx(found.perplexity_ratio * error)
    assert found.probability_change == pytest.approx(np.sqrt(np.mean((np.exp(-after) - np.exp(-before)) ** 2)))
    assert json.loads(json.dumps(found.to_dict()))["mean_kl"] == found.mean_kl
    text = str(found)
    assert "mean KL" in text
    assert "same top token" in text
    assert "(here)" in text


def test_losses() -> None:
    found = summarise_losses([1.0, 2.0, 3.0], [1.5, 2.0, 4.0])
    assert (found.loss_before, found.loss_after, found.loss_change) == (2.0, 2.5, 0.5)
    assert found.loss_change_error == pytest.approx(np.std([0.5, 0, 1], ddof=1) / math.sqrt(3))
    assert "loss before" in str(found)
    assert found.to_dict()["kind"] == "loss"


def test_losses_that_are_no_numbers_are_left_out_and_counted() -> None:
    found = summarise_losses([1.0, math.nan, 3.0, 1.0], [1.5, 2.0, 4.0, math.inf])
    assert (found.batches, found.loss_before, found.loss_change, found.non_finite) == (2, 2.0, 0.75, 0.5)
    assert "Warning: 50.0 % of the batches have a NaN or infinite loss" in str(found)
