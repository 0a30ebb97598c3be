"""Whole models: which blocks are wrapped, shared and frozen weights, derivatives of derivatives, mlx-lm."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkpoint_contract import apart, assert_same, train
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlx_tune as mt


class Block(nn.Module):
    def __init__(self, width=16, inner=None):
        super().__init__()
        self.inner = inner if inner is not None else nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x):
        return apart(x + apart(self.dropout(apart(mx.tanh(apart(self.inner(self.norm(x))))))))


class OtherBlock(Block):
    def __call__(self, x):
        return apart(x + apart(self.dropout(apart(mx.sin(self.inner(x))))))


class Smooth(Block):
    """Few operations in its second derivative."""

    def __call__(self, x):
        return apart(self.dropout(apart(mx.sin(apart(self.inner(x))))))


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def square(model, x):
    return mx.square(apart(model(x))).mean()


X = mx.random.normal((3, 16), key=mx.random.key(1))


def six():
    return Model([Block() for _ in range(6)])


def mixed():
    return Model([Block(), OtherBlock(), Block(), OtherBlock()])


def tied():
    shared = nn.Linear(16, 16)
    return Model([Block(inner=shared) for _ in range(3)])


def repeated():
    return Model([Block()] * 3)


def frozen():
    model = six()
    model.freeze()
    for layer in model.layers[::2]:
        layer.inner.unfreeze()
    return model


def twice(model):
    mt.checkpoint_blocks(model)
    mt.checkpoint_blocks(model)


def undone(model):
    mt.checkpoint_blocks(model).undo()


def resting(model):
    mt.checkpoint_blocks(model)
    model.eval()


def nested(model):
    for layer in model.layers:
        mt.checkpoint(layer)
        mt.checkpoint(layer.inner)


WAYS = pytest.mark.parametrize(
    ("compiled", "flat"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["eager", "compiled", "eager-flat", "compiled-flat"],
)


@pytest.mark.cpu_only
@WAYS
@pytest.mark.parametrize(
    ("make", "wrap", "kinds", "plain_calls", "calls", "relative"),
    [
        (six, mt.checkpoint_blocks, [Block], 6, 12, 0),
        (six, lambda model: mt.checkpoint_blocks(model, every=3), [Block], 6, 8, 0),
        (six, twice, [Block], 6, 12, 0),
        (six, nested, [Block], 6, 12, 0),
        (six, nested, [nn.Linear], 6, 18, 0),
        (mixed, mt.checkpoint_blocks, [Block, OtherBlock], 4, 8, 0),
        (tied, mt.checkpoint_blocks, [Block], 3, 6, 1e-6),
        (tied, nested, [Block], 3, 6, 1e-6),
        (repeated, mt.checkpoint_blocks, [Block], 3, 6, 1e-6),
        (frozen, mt.checkpoint_blocks, [Block], 6, 12, 0),
        (six, undone, [Block], 6, 6, 0),
        (six, resting, [Block], 6, 6, 0),
    ],
    ids=[
        *("all", "every third", "twice", "nested", "nested inner", "mixed", "tied", "tied and nested", "repeated"),
        *("frozen", "undone", "evaluation mode"),
    ],
)
def test_models(make, wrap, kinds, plain_calls, calls, relative, compiled, flat):
    def plain_way(model):
        if wrap is resting:
            model.eval()

    how = {"compiled": compiled, "flat": flat, "count": kinds}
    plain = train(make, square, X, wrap=plain_way, **how)
    checked = train(make, square, X, wrap=wrap, **how)
    times = 1 if compiled else 2  # a compiled step is traced once, an eager one is run twice
    assert (plain.calls, checked.calls) == (plain_calls * times, calls * times)
    assert_same(plain, checked, relative)


def penalty(model, x):
    """On the gradient of the input, as in WGAN-GP: the gradient of a gradient."""
    return mx.square(mx.grad(lambda x: square(model, x))(x)).sum()


@pytest.mark.cpu_only
@WAYS
def test_second_order(compiled, flat):
    how = {"compiled": compiled, "flat": flat, "count": [Smooth], "steps": 1}
    plain = train(lambda: Model([Smooth(), Smooth()]), penalty, X, **how)
    checked = train(lambda: Model([Smooth(), Smooth()]), penalty, X, wrap=mt.checkpoint_blocks, **how)
    assert plain.calls == 2
    assert checked.calls > 4, "run for the value, for its gradient, and for the gradient of that"
    assert plain.arrays["step 0 loss"].item() == checked.arrays["step 0 loss"].item()
    assert_same(plain, checked, 1e-5)


def test_third_and_fourth_order():
    def plain(x):
        return mx.sin(x) * mx.exp(0.3 * x)

    function, fast = plain, mt.checkpoint(plain)
    for _ in range(4):
        function, fast = mx.grad(function), mx.grad(fast)
        assert fast(mx.array(0.7)).item() == pytest.approx(function(mx.array(0.7)).item(), rel=1e-6)


def test_forward_derivatives_and_vmap():
    weight = mx.array([[0.3, -0.2], [0.1, 0.4]])

    def plain(x):
        return mx.tanh(x @ weight)

    fast, x = mt.checkpoint(plain), mx.array([0.5, -1.0])
    assert mx.array_equal(mx.jvp(fast, [x], [x])[1][0], mx.jvp(plain, [x], [x])[1][0])
    many = mx.stack([x, 2 * x, -x])
    assert mx.allclose(mx.vmap(fast)(many), plain(many))
    through = [mx.grad(lambda many, f=f: mx.vmap(f)(many).sum())(many) for f in (plain, fast)]
    assert mx.allclose(*through)


@pytest.mark.parametrize("checkpoint", [mt.checkpoint, mx.checkpoint], ids=["ours", "mx.checkpoint"])
def test_what_raises_as_it_does_for_mx_checkpoint(checkpoint):
    gradient = mx.grad(checkpoint(lambda x: mx.sin(x)))
    with pytest.raises(ValueError, match=r"vmap.*Depends"):
        mx.vmap(gradient)(mx.array([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"jvp.*Depends"):
        mx.jvp(gradient, [mx.array(0.1)], [mx.array(1.0)])
    with pytest.raises(ValueError, match="infer"):
        mx.compile(mx.grad(lambda x: checkpoint(mx.sin)(x).sum()), shapeless=True)(mx.ones((2,)))


ARGUMENTS = {
    "llama": {
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
    },
    "qwen3_moe": {
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "query_pre_attn_scalar": 16,
    },
    "mamba": {
        "intermediate_size": 64,
        "state_size": 4,
        "conv_kernel": 4,
        "use_bias": True,
        "use_conv_bias": True,
        "time_step_rank": 2,
    },
    "qwen3_next": {
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 64,
        "full_attention_interval": 2,
    },
}


def language_model(name):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    sizes = {"model_type": name, "hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 53, **ARGUMENTS[name]}
    return module.Model(module.ModelArgs.from_dict(sizes))


def next_token(model, tokens):
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()


TOKENS = mx.random.randint(0, 53, (2, 9), key=mx.random.key(2))


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("name", "compiled", "flat"),
    [
        *((name, False, False) for name in ARGUMENTS),
        *((name, False, True) for name in ARGUMENTS),
        pytest.param("llama", True, False, marks=pytest.mark.slow),  # eighteen kernels for the C++ compiler
    ],
)
def test_mlx_lm_models(name, compiled, flat):
    block = type(language_model(name).layers[0])
    how = {"compiled": compiled, "flat": flat, "count": [block], "steps": 1}
    plain = train(lambda: language_model(name), next_token, TOKENS, **how)
    checked = train(lambda: language_model(name), next_token, TOKENS, wrap=mt.checkpoint_blocks, **how)
    assert (plain.calls, checked.calls) == (3, 6)
    assert_same(plain, checked)


@pytest.mark.cpu_only
def test_lora_with_dropout_on_a_quantized_llama():
    def make():
        model = language_model("llama")
        nn.quantize(model, group_size=32, bits=4)
        model.freeze()
        linear_to_lora_layers(model, 3, {"rank": 4, "dropout": 0.3, "scale": 2.0})
        for _, module in model.named_modules():
            if hasattr(module, "lora_b"):
                module.lora_b = mx.random.normal(module.lora_b.shape) * 0.1
        return model

    plain = train(make, next_token, TOKENS)
    assert_same(plain, train(make, next_token, TOKENS, wrap=mt.checkpoint_blocks))
    assert len([name for name in plain.arrays if name.startswith("step 0 gradient")]) > 8
