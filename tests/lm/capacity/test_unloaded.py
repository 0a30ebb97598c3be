from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from workload_models import EXPERTS, FAMILIES, configuration

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.capacity.unloaded import Unloaded, dtype_of, kind_of, longest_context, shortened


def test_nothing_is_allocated():
    huge = configuration("llama", hidden_size=65536, intermediate_size=262144, num_hidden_layers=40, vocab_size=200_000)
    before = mx.get_active_memory()
    model = Unloaded(huge, bits=4).build()
    assert sum(array.nbytes for _, array in tree_flatten(model.parameters())) > 1e12
    assert mx.get_active_memory() - before < 1e6  # keys of random streams, some bytes each


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v3", "gpt_oss", "lfm2_moe", "exaone_moe"])
def test_a_shortened_configuration_makes_the_blocks_that_are_kept(family):
    config = configuration(family, num_hidden_layers=6)
    whole = [kind_of(block) for block in Unloaded(config).build().layers]
    keep = (0, 1, 2, 3) if family not in EXPERTS | {"lfm2": 0} else (0, 1, 2)
    short = [kind_of(block) for block in Unloaded(config).build(keep).layers]
    assert short == [whole[i] for i in keep]


def test_a_configuration_is_shortened_wherever_it_speaks_of_blocks():
    config = {
        "text_config": {
            "num_hidden_layers": 4,
            "layer_types": ["a", "b", "c", "d"],
            "hybrid_override_pattern": "M*M-",
            "mlp_only_layers": [0, 3],
            "rope": [1.0, 2.0],
        },
        "vision_config": {"num_hidden_layers": 4},
    }
    assert shortened(config, [0, 3]) == {
        "text_config": {
            "num_hidden_layers": 2,
            "layer_types": ["a", "d"],
            "hybrid_override_pattern": "M-",
            "mlp_only_layers": [0, 1],
            "rope": [1.0, 2.0],
        },
        "vision_config": {"num_hidden_layers": 4},
    }
    assert shortened({"hidden_size": 3}, [0]) == {"hidden_size": 3}


def test_blocks_differ_by_what_is_trained_and_by_their_flags():
    model = Unloaded(configuration("gemma3_text", num_hidden_layers=3)).build()
    near, far, near_again = model.layers
    assert kind_of(near) == kind_of(near_again) != kind_of(far)
    near.freeze()
    assert kind_of(near) != kind_of(near_again)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"text_config": {"dtype": "torch.float32"}}, "float32"),
        ({"torch_dtype": "float8_e4m3fn"}, "bfloat16"),
    ],
)
def test_weights_have_the_dtype_that_the_configuration_names(config, dtype):
    assert dtype_of(config) == dtype
    model = Unloaded(configuration("llama") | config).build()
    assert model.layers[0].self_attn.q_proj.weight.dtype == getattr(mx, dtype)


def test_a_context_is_as_long_as_the_configuration_allows():
    assert longest_context({"max_position_embeddings": 4096}) == 4096
    assert longest_context({"text_config": {"max_position_embeddings": 8192}}) == 8192
    assert longest_context({}) > 1e9


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "names no model_type"),
        ({"model_type": "transformer9"}, "model_type='transformer9': mlx-lm .* does not know this architecture"),
        ({"model_type": "llama", "hidden_size": 64}, "cannot build a 'llama' from this configuration"),
    ],
)
def test_what_cannot_be_built_is_refused(config, text):
    with pytest.raises(InvalidArgumentError, match=text):
        Unloaded(config).build()
