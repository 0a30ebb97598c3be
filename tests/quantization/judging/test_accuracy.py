import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import quantization_toys as toys
from token_figures import reference_figures

from mlx_tune.quantization.judging.accuracy import LanguageAccuracy
from mlx_tune.quantization.judging.evaluation import prepare_evaluation
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.sites import WalkedModel


def floor_of(model: nn.Module, *batches: mx.array) -> LanguageAccuracy:
    found = prepare_evaluation(WalkedModel(model), read_batches(batches, "evaluation"), None).side_by_side(
        WalkedModel(model), WalkedModel(model)
    )
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
