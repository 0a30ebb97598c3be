import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys

import mlx_tune as mt
from mlx_tune.errors import QuantizationError


def test_nothing_is_changed_and_no_weight_is_read(tmp_path) -> None:
    model = toys.llama()
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), toys.arrays_of(model))
    model.load_weights(list(mx.load(str(tmp_path / "weights.safetensors")).items()))
    gc.collect()  # what is left of other tests
    before = mx.get_active_memory()
    plan = mt.plan_quantization(model, 4, 64)
    assert mx.get_active_memory() == before
    assert type(model.model.embed_tokens) is nn.Embedding
    assert len(plan.layers) == 1 + 2 * 7


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"overrides": {"*.lm_haed": {"bits": 8}}}, r"no layer matches '\*\.lm_haed'. Layers are named like lm_head"),
        ({"skip": "nonsense"}, "skip: no layer matches 'nonsense'"),
        (
            {"skip": "model.layers.0"},
            r"is no layer, but holds some: 'model\.layers\.0\.\*' means all",
        ),
        ({"skip": 3}, "skip=3 must be a pattern or a list of patterns"),
        ({"skip": [3]}, "skip: 3 must be text"),
        ({"overrides": {"lm_head": {"bits": 64, "group_size": 4}}}, "swapped"),
        ({"overrides": {"lm_head": {"bits": 9}}}, r"overrides\['lm_head'\]: bits=9 is not supported"),
        ({"overrides": {"lm_head": {"width": 9}}}, "has 'width': only 'bits', 'group_size' and 'mode'"),
        ({"overrides": {"lm_head": 8}}, "must be a dict of bits"),
        ({"overrides": ["lm_head"]}, "must map patterns to formats"),
        ({"method": "awq"}, "method='awq' is unknown: choose one of nearest, optimal, gptq, dwq"),
        ({"effort": "more"}, "effort='more' is unknown"),
        ({"mode": "mxfp4", "method": "gptq"}, "mode='mxfp4' has neither"),
        ({"activations": True}, "activations=True does not work in mode 'affine'"),
        ({"mode": "mxfp4", "activations": True}, "nvfp4 and mxfp8 only"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict, text: str) -> None:
    with pytest.raises(QuantizationError, match=text):
        mt.plan_quantization(toys.llama(tied=False), 4, 64, **arguments)


def test_not_a_module() -> None:
    with pytest.raises(QuantizationError, match=r"model is a dict, not an mlx.nn.Module"):
        mt.plan_quantization({}, 4, 64)


def test_quantized_already() -> None:
    model = toys.llama()
    nn.quantize(model, 64, 4, class_predicate=lambda path, m: path.endswith("up_proj"))
    with pytest.raises(QuantizationError, match=r"2 of 15 layers.*model\.layers\.0\.mlp\.up_proj.*requantize=True"):
        mt.plan_quantization(model, 4, 64)
    for wanted in ({"bits": 8}, True):  # naming a quantized layer by hand is no permission to quantize it again
        with pytest.raises(QuantizationError, match=r"2 of 15 layers are quantized already"):
            mt.plan_quantization(model, 4, 64, overrides={"model.layers.0.mlp.up_proj": wanted})
    left = mt.plan_quantization(model, 4, 64, skip="*.up_proj")
    assert len(left.layers) == 13
    anew = mt.plan_quantization(model, 3, 64, requantize=True)
    assert len(anew.layers) == 15
    up = next(x for x in anew.layers if x.path.endswith("up_proj"))
    assert up.shape == (256, 128)
    assert up.bytes_before == 256 * 128 // 2 + 2 * 256 * 2 * 2
    assert anew.parameters == mt.plan_quantization(toys.llama(), 4, 64).parameters
