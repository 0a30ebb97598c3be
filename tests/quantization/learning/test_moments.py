import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_tune.quantization.learning.moments import InputMoments
from mlx_tune.quantization.learning.propagation import into_moments
from mlx_tune.quantization.models.interception import intercepted


def test_moments_are_those_of_the_inputs():
    layers = {"a": nn.Linear(8, 4), "b": nn.Linear(8, 4), "c": nn.Linear(8, 4)}
    moments = InputMoments(layers)
    xs = [mx.random.normal((2, 3, 8)) for _ in range(2)]
    for x in xs:
        with intercepted(layers.values(), into_moments(moments)):
            layers["a"](x)
            layers["b"](x)
            layers["c"](x + 1)
        moments.collect()
    flat = np.concatenate([np.array(x).reshape(-1, 8) for x in xs])
    np.testing.assert_allclose(np.array(moments.of("a")), flat.T @ flat, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(moments.of("c")), (flat + 1).T @ (flat + 1), rtol=1e-4, atol=1e-4)
    assert moments.of("b") is moments.of("a")
    assert moments.tokens == {"a": 12, "b": 12, "c": 12}


def test_drift_is_what_inputs_were_before_less_what_they_are():
    layers = {"a": nn.Linear(8, 4), "b": nn.Linear(8, 4), "c": nn.Linear(8, 4)}
    moments = InputMoments(layers, own_drift=True)
    rng = np.random.default_rng(0)
    before, now = rng.normal(size=(2, 2, 3, 8)), rng.normal(size=(2, 2, 3, 8))
    for i in range(2):
        with intercepted(layers.values(), into_moments(moments)):
            x = mx.array(before[i])
            layers["a"](x), layers["b"](x), layers["c"](x[:1])
            calls = moments.take()
            x = mx.array(now[i])
            layers["a"](x), layers["b"](x), layers["c"](x + 1)
        moments.collect(calls)
    d, x = (before - now).reshape(-1, 8), now.reshape(-1, 8)
    np.testing.assert_allclose(np.array(moments.of("a")), x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(moments.drift_of("a").cross), d.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.array(moments.drift_of("a").own), d.T @ d, rtol=1e-4, atol=1e-4)
    assert moments.drift_of("b") is moments.drift_of("a")
    assert moments.drift_of("c") is None  # it was given other shapes
    with intercepted(layers.values(), into_moments(moments)):
        layers["a"](mx.zeros((3, 8)))
    moments.collect()
    assert moments.drift_of("a") is None  # one call without a counterpart


@pytest.mark.parametrize("sort", [False, True])
def test_each_expert_has_the_moments_of_its_own_tokens(sort):
    from mlx_lm.models.switch_layers import SwitchGLU

    mx.random.seed(1)
    layer = SwitchGLU(8, 16, 3)
    rows = 80 if sort else 5  # mlx-lm sorts tokens by expert from 64 on
    x, chosen = mx.random.normal((1, rows, 8)), mx.random.randint(0, 3, (1, rows, 2))
    moments = InputMoments({"up": layer.up_proj, "gate": layer.gate_proj})
    with intercepted([layer.up_proj, layer.gate_proj], into_moments(moments)):
        layer(x, chosen)
    moments.collect()
    inputs, experts = np.array(x)[0], np.array(chosen)[0]
    for expert in range(3):
        mine = np.concatenate([inputs[experts[:, k] == expert] for k in range(2)])
        np.testing.assert_allclose(np.array(moments.of("up"))[expert], mine.T @ mine, rtol=1e-3, atol=1e-3)
    assert moments.of("gate") is moments.of("up")
    assert moments.tokens["up"] == 2 * rows
