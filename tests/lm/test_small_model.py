import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_tune.lm.small_model import next_token_loss, perplexity, small_llama, train_tokenizer

TEXTS = ["def f(x):\n    return x\n", "memory can be planned, memory can be measured"]
TOKENS = mx.array([[1, 5, 2, 0], [3, 3, 4, 1]])


@pytest.fixture
def model() -> nn.Module:
    mx.random.seed(0)
    return small_llama(16, width=64, layers=1)[0]


def losses_of(model: nn.Module, tokens: mx.array) -> np.ndarray:
    """Of every next token, in float64."""
    logits = np.array(model(tokens[:, :-1]).astype(mx.float32)).astype(np.float64)
    chosen = np.take_along_axis(logits, np.array(tokens[:, 1:])[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def test_the_loss_is_that_of_numpy(model: nn.Module) -> None:
    assert next_token_loss(model, TOKENS).item() == pytest.approx(losses_of(model, TOKENS).mean(), rel=1e-5)


def test_perplexity_is_over_all_batches_and_leaves_the_mode(model: nn.Module) -> None:
    batches = [TOKENS, TOKENS[::-1] + 2]
    expected = math.exp(np.mean([losses_of(model, batch).mean() for batch in batches]))
    for training in (True, False):
        model.train(training)
        assert perplexity(model, batches) == pytest.approx(expected, rel=1e-5)
        assert model.training is training


def test_the_configuration_makes_the_same_model_anew() -> None:
    model, config = small_llama(40, width=64, layers=2)
    again = llama.Model(llama.ModelArgs.from_dict(config))
    shapes = [[(name, array.shape) for name, array in tree_flatten(m.parameters())] for m in (model, again)]
    assert shapes[0] == shapes[1]
    assert len(model.layers) == 2
    assert model(mx.zeros((1, 3), mx.int32)).shape == (1, 3, 40)


def test_a_tokenizer_gives_its_texts_back_in_as_many_tokens_as_asked_for(tmp_path) -> None:
    tokenizer = train_tokenizer(TEXTS, 262, tmp_path / "made")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert max(tokenizer.encode(text)) < 262
    assert tokenizer.vocab_size <= 262
    assert tokenizer.encode("memory") < tokenizer.encode("memory can")
    assert len(tokenizer.encode(TEXTS[1])) < len(TEXTS[1])
