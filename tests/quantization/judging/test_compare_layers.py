import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.errors import QuantizationError


def quiet(model: nn.Module, *args, **kwargs) -> mt.QuantizationReport:
    return mt.quantize_model(model, *args, progress=False, **kwargs)


def test_quantization_report_of_two_models() -> None:
    reference, model = toys.llama(), toys.llama()
    expected = quiet(model, 3, 64, evaluation=[toys.tokens()])
    found = mt.quantization_report(model, reference, [toys.tokens()])
    assert found.size_before_bytes == expected.size_before_bytes
    assert found.size_after_bytes == expected.size_after_bytes
    assert found.bits_per_weight == expected.bits_per_weight
    assert [x.path for x in found.layers] == [x.path for x in expected.layers]
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert a.snr_db == pytest.approx(b.snr_db, abs=1e-3)
    assert found.accuracy.mean_kl == pytest.approx(expected.accuracy.mean_kl, rel=1e-5)
    assert model.model.layers[0].mlp.up_proj.bits == 3


def test_models_that_do_not_belong_together() -> None:
    with pytest.raises(QuantizationError, match="not two versions of one model"):
        mt.quantization_report(toys.vision(), nn.Sequential(toys.vision()), [mx.ones((2, 8, 8, 3))])
    small = toys.llama(vocab_size=128)
    with pytest.raises(QuantizationError, match=r"differ in shape|not two versions"):
        mt.quantization_report(small, toys.llama(), [toys.tokens()])
