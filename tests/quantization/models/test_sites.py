import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import quantization_toys as toys
from mlx.utils import tree_flatten

from mlx_tune.errors import QuantizationError
from mlx_tune.measuring.float32_products import rounds_factors
from mlx_tune.quantization.models.sites import WalkedModel, in_places
from mlx_tune.state import same_random_stream


def test_walk_names_every_module_once() -> None:
    model = toys.llama()
    sites = WalkedModel(model).sites
    assert len({id(s.module) for s in sites}) == len(sites)
    names = {p for s in sites for p in s.paths}
    assert {name.rpartition(".")[0] for name, _ in tree_flatten(model.parameters())} <= names


def test_sites_stay_true_while_modules_are_replaced() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    top, shared, _ = WalkedModel(model).sites
    assert (top.module, shared.module, shared.paths) == (model, layer, ("layers.0", "layers.2"))
    new, other = nn.Linear(2, 2), nn.ReLU()
    shared.put(new)
    assert model.layers[0] is model.layers[2] is shared.module is new
    with pytest.raises(ZeroDivisionError), in_places([(shared, other)]):  # noqa: PT012
        assert model.layers[0] is model.layers[2] is other
        raise ZeroDivisionError
    assert model.layers[0] is model.layers[2] is new


def test_only_modules_are_walked() -> None:
    with pytest.raises(QuantizationError, match=r"model is a list, not an mlx\.nn\.Module"):
        WalkedModel([nn.Linear(2, 2)])


def test_float32_arithmetic_is_that_of_a_float32_model() -> None:
    model = toys.llama(tied=False)
    x = toys.tokens()
    with WalkedModel(model).evaluation_mode(), WalkedModel(model).float32_arithmetic():
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
    with WalkedModel(model).evaluation_mode(), WalkedModel(model).float32_arithmetic():
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
    # mlx-lm dequantizes modes of floats in bfloat16, exactly but for sums; CUDA rounds factors to ten bits.
    tolerance = 1e-4 if mode == "affine" and not rounds_factors() else 2e-2
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
        WalkedModel(model).evaluation_mode(),
        WalkedModel(model).float32_arithmetic(),
    ):
        assert not any(m.training for m in model.modules())
        mx.random.uniform()
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == flags
    assert [type(m) for m in model.modules()] == kinds
    assert mx.random.uniform().item() == expected
