"""What other checkpoints do to the same blocks: the reason why there is another one."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoint_cases import CASES, DropoutBlock, NormBlock, Stack, batch, square
from checkpoint_contract import assert_same, bare_checkpoint, train, wrap_bare
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import grad_checkpoint

import mlx_tune as mt


@pytest.mark.cpu_only
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "name",
    [
        *("dropout", "two dropouts", "dropout in attention", "lora on a quantized base", "batch norm", "convolution"),
        *("captured by a closure", "captured with the model", "parked on another object", "cache"),
    ],
)
def test_mx_checkpoint_trains_otherwise(name, compiled):
    """Another mask, statistics that moved twice, gradients that are zero: and nothing says so."""
    case = CASES[name]
    plain = case.train(compiled=compiled)
    bare = case.train(compiled=compiled, wrap=wrap_bare(case.kind))
    with pytest.raises(AssertionError, match="apart"):
        assert_same(plain, bare, relative=1e-3)


@pytest.mark.parametrize("name", ["integers", "key"])
def test_mx_checkpoint_raises_on_integers(name):
    case = CASES[name]
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)vjp"):
        case.train(wrap=wrap_bare(case.kind))


@pytest.mark.parametrize("kind", [DropoutBlock, NormBlock])
def test_nn_utils_checkpoint_does_the_same(kind):
    mx.random.seed(0)
    module = kind()
    fast = nn.utils.checkpoint(module)
    x = batch()[0]
    found = []
    for call in (module, fast):
        mx.random.seed(1)
        value, gradient = nn.value_and_grad(module, lambda x, call=call: mx.square(call(x)).mean())(x)
        mx.eval(value, gradient, module.state)
        found.append((gradient["inner"]["weight"], dict(tree_flatten(module.parameters()))))
        if kind is NormBlock:
            module.norm.running_mean = mx.zeros_like(module.norm.running_mean)
    if kind is NormBlock:
        assert mx.abs(found[0][1]["norm.running_mean"]).sum() < mx.abs(found[1][1]["norm.running_mean"]).sum()
    else:
        assert not mx.allclose(found[0][0], found[1][0], rtol=1e-3)


def language_model(layers=3):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 53}
    return llama.Model(llama.ModelArgs("llama", num_hidden_layers=layers, rms_norm_eps=1e-5, **sizes))


class Counted(llama.TransformerBlock):
    """A class of the test's own, since mlx-lm changes it for good."""

    def __call__(self, *args, **kwargs):
        calls.append(1)
        return super().__call__(*args, **kwargs)


class OtherCounted(Counted):
    """As in models whose layers alternate."""


calls = []


def calls_of_a_step(wrap, kinds=(Counted,), mode="train"):
    """How often the three blocks run in one gradient, each class made anew."""
    kinds = [type(kind.__name__, (kind,), {"__call__": kind.__call__}) for kind in kinds]
    model = language_model()
    for i, layer in enumerate(model.layers):
        layer.__class__ = kinds[i % len(kinds)]
    wrap(model)
    getattr(model, mode)()
    calls.clear()
    tokens = mx.array([[1, 2, 3]])
    mx.eval(nn.value_and_grad(model, lambda: model(tokens).sum())()[1])
    return len(calls)


def with_mlx_lm(model):
    grad_checkpoint(model.layers[0])


def ours(model):
    mt.checkpoint_blocks(model)


def thrice(way):
    return lambda model: [way(model) for _ in range(3)]


@pytest.mark.parametrize(
    ("situation", "how", "theirs", "expected"),
    [
        ("once", {}, 6, 6),
        ("mixed classes", {"kinds": (Counted, OtherCounted)}, 5, 6),
        ("evaluation mode", {"mode": "eval"}, 6, 3),
    ],
)
def test_mlx_lm_counts(situation, how, theirs, expected):
    assert calls_of_a_step(lambda model: None, **how) == 3
    assert calls_of_a_step(with_mlx_lm, **how) == theirs
    assert calls_of_a_step(ours, **how) == expected


def test_mlx_lm_wraps_again_and_again():
    assert calls_of_a_step(thrice(with_mlx_lm)) == 12
    assert calls_of_a_step(thrice(ours)) == 6


def test_mlx_lm_changes_the_class_for_every_instance(monkeypatch):
    kind = llama.TransformerBlock
    before = kind.__call__
    monkeypatch.setattr(kind, "__call__", before)
    with_mlx_lm(language_model())
    assert kind.__call__ is not before, "every llama of this process is changed"
    monkeypatch.undo()
    ours(language_model())
    assert kind.__call__ is before


@pytest.mark.cpu_only
def test_mx_checkpoint_is_as_good_where_nothing_is_drawn_written_or_captured():
    """So the comparisons above do not fail for some other reason."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def __call__(self, x):
            return mx.tanh(self.inner(x))

    def wrap(model):
        for layer in model.layers:
            bare_checkpoint(layer)

    plain = train(lambda: Stack(Block), square, *batch(), count=[Block])
    bare = train(lambda: Stack(Block), square, *batch(), count=[Block], wrap=wrap)
    assert bare.calls == 2 * plain.calls
    assert_same(plain, bare)
