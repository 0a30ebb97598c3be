import mlx.core as mx
import mlx.nn as nn
import pytest
from quantization_toys import llama, tokens

from mlx_tune.checkpointing.blocks import blocks_of
from mlx_tune.quantization.models.reading import reading, reading_in_turn
from mlx_tune.quantization.models.sites import WalkedModel, own_arrays
from mlx_tune.upstream import is_lazy


def lazy(module: nn.Module) -> bool:
    return all(is_lazy(a) for site in WalkedModel(module).sites for a in own_arrays(site.module).values())


def on_disk(model: nn.Module, folder) -> nn.Module:
    model.save_weights(str(folder / "w.safetensors"))
    model.load_weights(str(folder / "w.safetensors"))
    return model


def test_weights_are_there_for_the_block_alone(tmp_path):
    layer = on_disk(nn.Linear(4, 4), tmp_path)
    kept = layer.weight
    with pytest.raises(AttributeError), reading(layer):
        (lambda: None if is_lazy(layer.weight) else layer.nothing)()
    assert layer.weight is kept
    assert lazy(layer)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_read_in_turn_answers_the_same_and_keeps_nothing(tmp_path, tied):
    model = on_disk(llama(tied=tied), tmp_path)
    blocks, walked, x = [block for _, block in blocks_of(model)], WalkedModel(model), tokens()
    seen = []
    with reading_in_turn(walked, blocks):
        answer = model(x)
        mx.eval(answer)
        seen.append(lazy(model))
    assert seen == [True]
    mx.eval(model.parameters())
    with reading_in_turn(walked, blocks):  # nothing to do
        assert mx.array_equal(answer, model(x)).item()
