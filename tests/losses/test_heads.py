"""A head's arrays: which a gradient can be asked for, which are trained, and that calls leave them where they are."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from mlx_tune.losses.heads import Head
from mlx_tune.losses.linear_cross_entropy import linear_cross_entropy


def adapted() -> nn.Module:
    layer = LoRALinear.from_base(nn.QuantizedLinear(32, 9, bias=False, group_size=32, bits=4), r=2)
    layer.linear.freeze()
    return layer


@pytest.mark.parametrize(
    ("layer", "trained"),
    [
        (nn.Linear(4, 9), [True, True]),
        (nn.Linear(4, 9).freeze(), [False, False]),
        (nn.Embedding(9, 4), [True]),
        (nn.QuantizedLinear(32, 9, bias=True, group_size=32, bits=4), [False]),  # its bias alone
        (adapted(), [True, True]),  # scales and biases of the frozen base are constants
        (mx.zeros((9, 4)), [False]),
    ],
    ids=["linear", "frozen", "embedding", "quantized", "lora", "array"],
)
def test_arrays_are_those_that_a_gradient_can_be_asked_for(layer, trained):
    assert Head(layer).trained == trained
    assert len(Head(layer).arrays) == len(trained)


def test_logits_are_those_of_the_arrays_given():
    layer = nn.Linear(4, 9)
    head, x = Head(layer), mx.random.normal((3, 4))
    twice = head.logits([2 * a for a in head.arrays], x)
    assert mx.allclose(twice, 2 * layer(x), rtol=1e-5).item()


def test_a_layer_that_fails_keeps_its_arrays():
    class Failing(nn.Linear):
        def __call__(self, x):
            raise RuntimeError("mine")

    head = Failing(4, 9)
    before = dict(tree_flatten(head.parameters()))
    with pytest.raises(RuntimeError, match="mine"):
        linear_cross_entropy(mx.zeros((3, 4)), head, mx.arange(3))
    assert all(before[name] is array for name, array in tree_flatten(head.parameters()))
