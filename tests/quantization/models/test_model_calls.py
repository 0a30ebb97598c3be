import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.model_calls import outline, resolve


class Predictor(nn.Module):
    """Logits for token ids."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)

    def __call__(self, tokens):
        return self.embed.as_linear(self.embed(tokens))


class WholeRows(Predictor):
    """Takes rows of one length alone."""

    def __call__(self, tokens):
        return super().__call__(tokens.reshape(-1, 6))


def batches(*of):
    return read_batches(list(of), "evaluation")


def test_shapes_are_known_without_evaluating():
    model = Predictor()
    assert outline(model, batches(mx.zeros((4, 6), mx.int32))[0]) == [(1, 5, 16)]
    assert outline(nn.Linear(3, 2), batches(mx.zeros((4, 3)))[0]) == [(4, 2)]


def test_a_fault_is_handed_back():
    assert isinstance(outline(nn.Linear(3, 2), batches(mx.zeros((4, 5)))[0]), ValueError)


def test_integers_that_cannot_be_shortened_are_no_tokens():
    tokens = mx.zeros((4, 6), mx.int32)
    assert resolve(Predictor(), batches(tokens), "evaluation")[0].tokens is not None
    assert resolve(WholeRows(), batches(tokens), "evaluation")[0].tokens is None


def test_what_cannot_be_called_is_named_with_its_shapes():
    with pytest.raises(QuantizationError, match=r"model cannot be called with calibration\[0\] \(\[4, 5\]\)"):
        resolve(nn.Linear(3, 2), batches(mx.zeros((4, 5))), "calibration")
    with pytest.raises(QuantizationError, match="loss cannot be called"):
        resolve(nn.Linear(3, 2), batches(mx.zeros((4, 3))), "calibration", lambda model, x: model(x, x).sum())


def test_no_batches_need_no_call():
    assert resolve(nn.Linear(3, 2), [], "evaluation") == []
