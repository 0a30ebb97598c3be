import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import quantization_toys as toys
from token_figures import reference_figures

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.judging.accuracy import LanguageAccuracy, divergence_of
from mlx_tune.quantization.judging.evaluation import Watched, perplexity, prepare_evaluation
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.models.stored_outputs import OutputStore
from mlx_tune.quantization.planning.shape_check import resolve


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
    with WalkedModel(model).evaluation_mode():
        model(mx.ones((2, 64)))
        assert model.inner.weight.dtype == mx.float32
    assert model.inner.weight is before
    assert "seen" not in model


def test_recorded_and_side_by_side_agree() -> None:
    reference, model = toys.llama(), toys.llama()
    nn.quantize(model, 64, 3)
    batches = read_batches([toys.tokens(5, 17, seed=i) for i in range(2)], "evaluation")
    together = prepare_evaluation(WalkedModel(reference), batches, None).side_by_side(
        WalkedModel(model), WalkedModel(reference)
    )
    with OutputStore() as store:
        comparison = prepare_evaluation(WalkedModel(reference), batches, None)
        comparison.record(WalkedModel(reference), store)
        assert len(store) == len(comparison.parts)
        apart = comparison.judge(WalkedModel(model), store)
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

    comparison = prepare_evaluation(WalkedModel(Encoder()), read_batches([toys.tokens()], "evaluation"), None)
    assert comparison.kind == "outputs"
    with pytest.raises(QuantizationError, match="gives no logits"):
        perplexity(Encoder(), read_batches([toys.tokens()], "evaluation"))


def test_tokens_of_another_tokenizer_are_named() -> None:
    with pytest.raises(QuantizationError, match="holds token 96, but the model's vocabulary ends at 95"):
        prepare_evaluation(
            WalkedModel(toys.llama()), read_batches([toys.tokens(), mx.array([[3, 96, 4]])], "evaluation"), None
        )
    with pytest.raises(QuantizationError, match="holds token -100: padding would be judged as text"):
        prepare_evaluation(WalkedModel(toys.llama()), read_batches([mx.array([[3, 4, -100]])], "evaluation"), None)


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
        resolved = resolve(WalkedModel(model), read_batches(batches, "evaluation"), "evaluation")
        assert resolved[0].tokens is None
        comparison = prepare_evaluation(WalkedModel(model), resolved, None)
        assert comparison.kind == "outputs"
        found = comparison.side_by_side(WalkedModel(model), WalkedModel(model))
        assert (found.values, found.relative_error) == (20, 0)


def test_a_model_that_cannot_be_called_so() -> None:
    with pytest.raises(QuantizationError, match=r"cannot be called with evaluation\[0\] \(\[4, 3\]\)"):
        prepare_evaluation(WalkedModel(toys.vision()), read_batches([mx.zeros((4, 3))], "evaluation"), None)


@pytest.mark.parametrize("broken", [False, True])
def test_the_divergence_alone_is_that_of_all_figures(broken: bool) -> None:
    model = toys.llama(tied=False, dtype=mx.float32)
    batches = read_batches([toys.tokens(2, 17, seed=i) for i in range(2)], "evaluation")
    watched = Watched(WalkedModel(model), batches)
    with watched as divergence:
        assert divergence() == pytest.approx(0, abs=1e-9)
        model.lm_head.weight = model.lm_head.weight * 1.1
        if broken:  # tokens that are looked up here get no numbers, and are left out
            model.model.embed_tokens.weight[int(batches[0].tokens[0, 9])] = float("nan")
        accuracy = watched.evaluation.judge(WalkedModel(model), watched._store)
        assert (accuracy.non_finite > 0) == broken
        assert divergence() == pytest.approx(divergence_of(accuracy), rel=1e-5)
