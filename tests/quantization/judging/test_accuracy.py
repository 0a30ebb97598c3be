import json
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import quantization_toys as toys

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.judging.accuracy import LanguageAccuracy
from mlx_tune.quantization.judging.compare_answers import compare_outputs, compare_tokens, join_figures
from mlx_tune.quantization.judging.evaluation import perplexity, prepare_evaluation
from mlx_tune.quantization.judging.summaries import summarise_losses, summarise_outputs, summarise_tokens
from mlx_tune.quantization.models.answers import mean_loss
from mlx_tune.quantization.models.arithmetic import evaluation_mode, float32_arithmetic
from mlx_tune.quantization.models.batches import count_tokens, read_batches
from mlx_tune.quantization.models.model_calls import resolve
from mlx_tune.quantization.models.random_stream import same_random_stream
from mlx_tune.quantization.models.stored_outputs import OutputStore


def reference_figures(x: np.ndarray, y: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """The same figures in NumPy and float64."""

    def log_softmax(z: np.ndarray) -> np.ndarray:
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    lx, ly = log_softmax(x.astype(np.float64)), log_softmax(y.astype(np.float64))
    at = targets[..., None]
    return {
        "kl": (np.exp(lx) * (lx - ly)).sum(-1).reshape(-1),
        "reverse_kl": (np.exp(ly) * (ly - lx)).sum(-1).reshape(-1),
        "same_top": (x.argmax(-1) == y.argmax(-1)).reshape(-1),
        "nll_before": -np.take_along_axis(lx, at, -1).reshape(-1),
        "nll_after": -np.take_along_axis(ly, at, -1).reshape(-1),
        "confidence": np.exp(lx).max(-1).reshape(-1),
    }


def logits(seed: int, shape: tuple[int, ...] = (3, 7, 50)) -> mx.array:
    return 3 * mx.random.normal(shape, key=mx.random.key(seed))


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


def test_losses() -> None:
    found = summarise_losses([1.0, 2.0, 3.0], [1.5, 2.0, 4.0])
    assert (found.loss_before, found.loss_after, found.loss_change) == (2.0, 2.5, 0.5)
    assert found.loss_change_error == pytest.approx(np.std([0.5, 0, 1], ddof=1) / math.sqrt(3))
    assert "loss before" in str(found)
    assert found.to_dict()["kind"] == "loss"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(mx.array([1.0, 3.0]), 2.0), (2.5, 2.5), ((mx.array(1.5), mx.array(7)), 1.5), ([mx.array(4)], 4.0)],
)
def test_what_a_loss_may_give_back(value: object, expected: float) -> None:
    assert mean_loss(value).item() == expected


def test_what_a_loss_may_not_give_back() -> None:
    with pytest.raises(QuantizationError, match="loss gave back a NoneType: it must give back a number"):
        mean_loss(None)


def test_losses_that_are_no_numbers_are_left_out_and_counted() -> None:
    found = summarise_losses([1.0, math.nan, 3.0, 1.0], [1.5, 2.0, 4.0, math.inf])
    assert (found.batches, found.loss_before, found.loss_change, found.non_finite) == (2, 2.0, 0.75, 0.5)
    assert "Warning: 50.0 % of the batches have a NaN or infinite loss" in str(found)


# Half precision's own error


def floor_of(model: nn.Module, *batches: mx.array) -> LanguageAccuracy:
    found = prepare_evaluation(model, read_batches(batches, "evaluation"), None).side_by_side(model, model)
    assert isinstance(found, LanguageAccuracy)
    return found


def test_the_noise_floor_is_that_of_numpy(monkeypatch) -> None:
    monkeypatch.setattr("mlx_tune.quantization.judging.evaluation._FLOOR_TOKENS", 40)
    monkeypatch.setattr("mlx_tune.quantization.judging.evaluation._FLOOR_TOKENS_CPU", 40)
    model, x = toys.llama(tied=False), toys.tokens(4, 17)
    found = floor_of(model, x)
    assert found.noise_floor_tokens == 2 * 16  # whole rows, as far as they fit
    wide = toys.llama(tied=False)
    wide.set_dtype(mx.float32)
    own, exact = (np.array(m(x[:2, :-1]).astype(mx.float32)) for m in (model, wide))
    expected = reference_figures(exact, own, np.array(x[:2, 1:]))["kl"].mean()
    assert found.noise_floor == pytest.approx(expected, rel=0.05, abs=1e-7)
    assert floor_of(model, toys.tokens(1, 65)).noise_floor_tokens == 40  # of a long row its beginning


def test_where_there_is_no_noise_floor_the_text_says_why() -> None:
    found = floor_of(toys.llama(dtype=mx.float32), toys.tokens())
    assert (found.noise_floor, found.no_noise_floor) == (None, "the weights are float32")
    assert "No noise floor: the weights are float32." in str(found)


@pytest.mark.cpu_only
def test_nor_where_the_model_cannot_be_run_in_its_own_dtype() -> None:
    model = toys.qwen3_moe()
    model.set_dtype(mx.bfloat16)
    found = floor_of(model, toys.tokens())
    assert found.noise_floor is None
    assert "cannot run the model in its own dtype here ([GatherMM" in found.no_noise_floor
    packed = toys.llama()
    nn.quantize(packed, 64, 4)
    assert "multiplies by packed weights slowly" in floor_of(packed, toys.tokens()).no_noise_floor


def test_a_model_that_rounds_its_outputs_itself_is_not_called_exact() -> None:
    class Rounding(nn.Module):
        def __init__(self) -> None:  # nor does it call its base's
            self.inner = toys.llama()

        def __call__(self, x: mx.array) -> mx.array:
            return self.inner(x).astype(mx.bfloat16)

    found = floor_of(Rounding(), toys.tokens())
    assert found.arithmetic == "computed in float32, but the model itself rounds its outputs to bfloat16"
    assert floor_of(toys.llama(), toys.tokens()).arithmetic == "float32"


def test_one_sequence_has_no_standard_error() -> None:
    found = floor_of(toys.llama(), toys.tokens(1))
    assert "there is one" in str(found)
    assert "nan" not in str(found)
    assert "of 1 sequence (" in str(found)


# Batches


def test_batches_of_tokens_and_of_arguments() -> None:
    read = read_batches([np.zeros((2, 9), dtype=np.uint16), mx.zeros((5,), dtype=mx.int32)], "evaluation")
    assert [b.tokens.shape for b in read] == [(2, 9), (1, 5)]
    assert read_batches([[3, 1, 4], [1, 5]], "evaluation")[0].tokens.tolist() == [[3, 1, 4]]
    assert count_tokens(read) == 20
    others = read_batches([mx.zeros((2, 3)), (mx.zeros((2, 3)), mx.zeros((2,), dtype=mx.int32))], "evaluation")
    assert [len(b.arguments) for b in others] == [1, 2]
    assert all(b.tokens is None for b in others)
    assert read_batches(None, "evaluation") == []


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        (mx.zeros((2, 3)), r"Write evaluation=\[tokens\]"),
        (np.zeros((2, 3)), r"Write evaluation=\[tokens\]"),
        ([], "holds no batches"),
        ([mx.zeros((2, 1), dtype=mx.int32)], r"evaluation\[0\] has shape \[2, 1\]: token arrays need"),
        ([()], r"evaluation\[0\] is empty"),
        ([mx.zeros((2, 3)), None], r"evaluation\[1\] is None"),
        (["some text"], r"evaluation\[0\] is text: .*token_batches` makes tokens of text"),
        (3, "iterable of batches"),
    ],
)
def test_batches_that_cannot_be_used(batches: object, text: str) -> None:
    with pytest.raises(QuantizationError, match=text):
        read_batches(batches, "evaluation")


# Evaluation


def test_float32_arithmetic_is_that_of_a_float32_model() -> None:
    model = toys.llama(tied=False)
    x = toys.tokens()
    with evaluation_mode(model), float32_arithmetic(model):
        found = model(x)
    assert model(x).dtype == mx.bfloat16
    wide = toys.llama(tied=False)
    wide.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(found), np.array(wide(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [toys.llama, toys.qwen3_moe, toys.gemma2, toys.lfm2])
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_unpacked_evaluation_is_that_of_a_dequantized_model(make, mode: str) -> None:
    from mlx_lm.utils import dequantize_model

    model, x = make(), toys.tokens()
    nn.quantize(model, *((64, 4) if mode == "affine" else (32, 4)), mode=mode)
    kinds = [type(m) for m in model.modules()]
    with evaluation_mode(model), float32_arithmetic(model):
        found = model(x)
        mx.eval(found)
    assert [type(m) for m in model.modules()] == kinds
    assert found.dtype == mx.float32
    plain = make()
    nn.quantize(plain, *((64, 4) if mode == "affine" else (32, 4)), mode=mode)
    for _, module in plain.named_modules():  # scales to float32 first, so that dequantizing rounds nothing
        for name in ("scales", "biases"):
            if isinstance(module.get(name), mx.array) and mode == "affine":
                module[name] = module[name].astype(mx.float32)
    expected = dequantize_model(plain)
    expected.set_dtype(mx.float32)
    tolerance = 1e-4 if mode == "affine" else 2e-2  # mlx-lm dequantizes the latter in bfloat16, exactly but for sums
    np.testing.assert_allclose(np.array(found), np.array(expected(x)), rtol=tolerance, atol=tolerance)


def test_modes_classes_and_the_random_stream_come_back_after_an_error() -> None:
    model = toys.llama()
    model.layers[0].train(True)
    model.layers[1].eval()
    flags, kinds = [m.training for m in model.modules()], [type(m) for m in model.modules()]
    mx.random.seed(5)
    expected = mx.random.uniform().item()
    mx.random.seed(5)
    with (  # noqa: PT012
        pytest.raises(ZeroDivisionError),
        same_random_stream(),
        evaluation_mode(model),
        float32_arithmetic(model),
    ):
        assert not any(m.training for m in model.modules())
        mx.random.uniform()
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == flags
    assert [type(m) for m in model.modules()] == kinds
    assert mx.random.uniform().item() == expected


def test_perplexity_is_that_of_numpy() -> None:
    model = toys.llama(dtype=mx.float32)
    batches = [toys.tokens(3, 17, seed=i) for i in range(2)]
    found = perplexity(model, read_batches(batches, "evaluation"))
    losses = []
    for batch in batches:
        out, rows = np.array(model(batch[:, :-1]), dtype=np.float64), np.array(batch[:, 1:])
        losses.append(reference_figures(out, out, rows)["nll_before"])
    assert found == pytest.approx(math.exp(np.concatenate(losses).mean()), rel=1e-5)


def test_what_a_model_puts_into_itself_when_called_is_taken_out_again() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)
            self.inner.set_dtype(mx.bfloat16)

        def __call__(self, x: mx.array) -> mx.array:
            self.inner.weight = self.inner.weight.astype(mx.float32)  # as mlx-lm's Gemma 3n does
            self.seen = x
            return self.inner(x)

    model = Restless()
    before = model.inner.weight
    with evaluation_mode(model):
        model(mx.ones((2, 64)))
        assert model.inner.weight.dtype == mx.float32
    assert model.inner.weight is before
    assert "seen" not in model


def test_recorded_and_side_by_side_agree() -> None:
    reference, model = toys.llama(), toys.llama()
    nn.quantize(model, 64, 3)
    batches = read_batches([toys.tokens(5, 17, seed=i) for i in range(2)], "evaluation")
    together = prepare_evaluation(reference, batches, None).side_by_side(model, reference)
    with OutputStore() as store:
        comparison = prepare_evaluation(reference, batches, None)
        comparison.record(reference, store)
        assert len(store) == len(comparison.parts)
        apart = comparison.judge(model, store)
    assert isinstance(together, LanguageAccuracy)
    assert isinstance(apart, LanguageAccuracy)
    assert together.mean_kl == pytest.approx(apart.mean_kl, rel=1e-6)
    assert together.noise_floor == pytest.approx(apart.noise_floor)
    assert 0 < together.noise_floor < together.mean_kl
    assert together.perplexity_before == pytest.approx(perplexity(reference, batches), rel=1e-5)
    assert together.perplexity_after == pytest.approx(perplexity(model, batches), rel=1e-5)


def test_a_vocabulary_too_small_for_the_tokens_means_other_outputs() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(96, 64)

        def __call__(self, x: mx.array) -> mx.array:
            return self.table(x)

    comparison = prepare_evaluation(Encoder(), read_batches([toys.tokens()], "evaluation"), None)
    assert comparison.kind == "outputs"
    with pytest.raises(QuantizationError, match="gives no logits"):
        perplexity(Encoder(), read_batches([toys.tokens()], "evaluation"))


def test_tokens_of_another_tokenizer_are_named() -> None:
    with pytest.raises(QuantizationError, match="holds token 96, but the model's vocabulary ends at 95"):
        prepare_evaluation(toys.llama(), read_batches([toys.tokens(), mx.array([[3, 96, 4]])], "evaluation"), None)
    with pytest.raises(QuantizationError, match="holds token -100: padding would be judged as text"):
        prepare_evaluation(toys.llama(), read_batches([mx.array([[3, 4, -100]])], "evaluation"), None)


def test_integers_that_are_no_tokens_are_given_as_they_are() -> None:
    class Categories(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables = [nn.Embedding(8, 64) for _ in range(3)]
            self.head = nn.Linear(192, 5)

        def __call__(self, x: mx.array) -> mx.array:
            return self.head(mx.concatenate([table(x[:, i]) for i, table in enumerate(self.tables)], axis=-1))

    class Fixed(Categories):
        def __call__(self, x: mx.array) -> mx.array:
            return super().__call__(x.reshape(-1, 3))

    batches = [mx.random.randint(0, 8, (4, 3), key=mx.random.key(0))]
    for model in (Categories(), Fixed()):
        resolved = resolve(model, read_batches(batches, "evaluation"), "evaluation")
        assert resolved[0].tokens is None
        comparison = prepare_evaluation(model, resolved, None)
        assert comparison.kind == "outputs"
        found = comparison.side_by_side(model, model)
        assert (found.values, found.relative_error) == (20, 0)


def test_a_model_that_cannot_be_called_so() -> None:
    with pytest.raises(QuantizationError, match=r"cannot be called with evaluation\[0\] \(\[4, 3\]\)"):
        prepare_evaluation(toys.vision(), read_batches([mx.zeros((4, 3))], "evaluation"), None)
