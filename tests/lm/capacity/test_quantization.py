from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model
from workload_models import configuration, language_model

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.capacity.quantization import refuse_twice, stored_quantization
from mlx_tune.lm.capacity.unloaded import Unloaded
from mlx_tune.trees import nbytes_of

_PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("bits", "group_size", "mode"), [(4, 64, "affine"), (3, 32, "affine"), (4, 32, "mxfp4")])
def test_weights_are_packed_as_mlx_lm_packs_them(capsys, family, bits, group_size, mode):
    real = language_model(family)
    real.set_dtype(mx.bfloat16)
    _, config = quantize_model(real, configuration(family), group_size, bits, mode)
    for unloaded in (Unloaded(configuration(family), bits, group_size, mode), Unloaded(config)):
        model = unloaded.build()
        shapes = {path: (array.shape, array.dtype) for path, array in tree_flatten(model.parameters())}
        assert shapes == {path: (array.shape, array.dtype) for path, array in tree_flatten(real.parameters())}


def test_layers_of_their_own_format_keep_it_in_a_shorter_model():
    own = {"model.layers.5.mlp.down_proj": {"bits": 8, "group_size": 64}, "model.layers.0.mlp.up_proj": False}
    config = configuration("llama", num_hidden_layers=6) | {"quantization": {"bits": 4, "group_size": 64, **own}}
    model = Unloaded(config).build((0, 1, 5))
    assert [block.mlp.down_proj.bits for block in model.layers] == [4, 4, 8]
    assert isinstance(model.layers[0].mlp.up_proj, nn.Linear)
    assert isinstance(model.layers[1].mlp.up_proj, nn.QuantizedLinear)


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        ({}, None),
        ({"quantization": {"bits": 4, "group_size": 64}}, {"bits": 4, "group_size": 64}),
        ({"quantization_config": {"quant_method": "mxfp4"}}, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}},
            {"bits": 4, "group_size": 64, "mode": "affine"},
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, None),
        (
            {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}},
            {"bits": 8, "group_size": 32, "mode": "mxfp8"},
        ),
        (
            {
                "text_config": {
                    "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}
                }
            },
            {"bits": 4, "group_size": 32, "mode": "affine"},
        ),
    ],
)
def test_the_format_that_a_configuration_names_is_found(config, stored):
    assert stored_quantization(config) == stored


def test_a_format_that_mlx_lm_does_not_load_is_refused():
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
    with pytest.raises(InvalidArgumentError, match="float-quantized"):
        stored_quantization(config)


def test_quantized_weights_are_not_quantized_again():
    config = {"quantization": {"bits": 8, "group_size": 64}}
    with pytest.raises(InvalidArgumentError, match=r"bits=4: .* quantized already, to 8 bits. Leave bits out"):
        refuse_twice(config, 4)
    refuse_twice(config, None)
    refuse_twice({}, 4)


def test_bits_that_mlx_does_not_have_are_refused():
    with pytest.raises(InvalidArgumentError, match="bits=7"):
        Unloaded(configuration("llama"), bits=7).build()


def test_fewer_bits_are_fewer_bytes():
    sizes = [nbytes_of(Unloaded(configuration("llama"), bits=b).build().parameters()) for b in (2, 4, 8, None)]
    assert sizes == sorted(set(sizes))
