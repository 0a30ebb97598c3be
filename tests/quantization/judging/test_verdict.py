import math

import pytest
import quantization_toys as toys

from mlx_tune import quantize_model
from mlx_tune.quantization.judging.verdict import verdict_on_loss, verdict_on_outputs, verdict_on_tokens


@pytest.mark.parametrize(
    ("mean", "error", "floor", "words"),
    [
        (0.0009, 0.0, None, "indistinguishable from the original"),
        (0.0011, 0.0, None, "very close to the original"),
        (0.0011, 0.0, 0.0012, "indistinguishable from the original"),
        (0.0011, 0.0001, 0.0012, "very close to the original"),  # two errors above the floor
        (0.0011, math.nan, 0.0012, "indistinguishable from the original"),
        (0.0099, 0.0, 0.0012, "very close to the original"),
        (0.011, 0.0, 0.0012, "close to the original"),
        (0.11, 0.0, None, "clearly worse"),
        (1.1, 0.0, None, "broken"),
        (math.nan, math.nan, None, "broken"),
    ],
)
def test_words_go_by_the_divergence_and_its_error(mean, error, floor, words):
    assert verdict_on_tokens(mean, error, 0.9, floor=floor).partition(" on this text")[0].partition(":")[0] == words


def test_the_tokens_that_tell_two_models_apart_are_those_of_a_likelihood_ratio():
    odds, d = 20, 0.05
    assert f"some {math.log(odds) / d:.0f} tokens" in verdict_on_tokens(d, 0.0, 0.9)
    assert verdict_on_tokens(30.0, 0.0, 0.0).endswith("told apart after some 1 token")


def test_logits_that_are_not_finite_are_a_broken_model():
    assert verdict_on_tokens(0.0, 0.0, 1.0, non_finite=0.25) == "broken: 25.00 % of tokens got NaN or infinite logits"
    assert verdict_on_outputs(0.0, 0.5) == "broken: 50.00 % of the outputs are NaN or infinite"
    assert verdict_on_loss(1.0, math.nan, math.nan) == "broken: the loss is not finite"


def test_a_loss_is_judged_by_its_standard_error():
    assert verdict_on_loss(2.0, -0.1, 0.01) == "better: the loss fell by 5.0 %"
    assert verdict_on_loss(2, 0.1, 0.06) == "no difference that these batches can tell: the loss changed by +0.1 ± 0.06"
    assert verdict_on_loss(2.0, 0.1, math.nan).endswith("+0.1, on one batch")
    assert verdict_on_loss(0.0, 0.1, 0.01) == "worse: the loss rose by 0.1"
    assert verdict_on_loss(2.0, 0.0, 0.0).startswith("no difference")


def test_every_report_has_a_verdict_in_its_text_and_for_programs():
    model, text = toys.llama(), [toys.tokens(4, 33)]
    report = quantize_model(model, 8, 64, method="nearest", evaluation=text, verify_kernels=False, progress=False)
    assert " same next token" in report.verdict
    assert report.verdict in report.summary()
    assert report.verdict[1:] in " ".join(str(report).split())
    assert report.to_dict()["verdict"] == report.verdict == report.accuracy.to_dict()["verdict"]
    plain = quantize_model(toys.llama(), 8, 64, method="nearest", verify_kernels=False, progress=False)
    assert plain.verdict is None
