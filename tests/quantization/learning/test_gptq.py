from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import quantization_toys as toys
from mlx.utils import tree_flatten

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.formats.affine import dequantize_float32, quantize_affine
from mlx_tune.quantization.formats.packing import AFFINE_BITS, unpack
from mlx_tune.quantization.learning import drift_correction
from mlx_tune.quantization.learning import gptq_model as passes
from mlx_tune.quantization.learning.apply_layer import install
from mlx_tune.quantization.learning.drift_correction import corrected, drifted_output_error
from mlx_tune.quantization.learning.gptq import output_error, quantize_gptq
from mlx_tune.quantization.learning.gptq_model import gptq_model
from mlx_tune.quantization.learning.moments import Drift, InputMoments
from mlx_tune.quantization.learning.propagation import Propagation, into_moments
from mlx_tune.quantization.models.arithmetic import running
from mlx_tune.quantization.models.batches import read_batches
from mlx_tune.quantization.models.interception import forward_steps, intercepted, run_until
from mlx_tune.quantization.quantize import blocks_of


def correlated_inputs(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(columns, columns)) * np.exp(rng.normal(size=columns) * 0.7)
    return mx.array((rng.normal(size=(rows, columns)) @ (np.eye(columns) + 0.3 * mix)).astype(np.float32))


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_outputs_lose_less_than_with_the_best_grid_for_the_weights(bits):
    x = correlated_inputs(512, 128)
    weight = mx.random.normal((32, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    result = quantize_gptq(weight, x.T @ x, bits, 64)
    assert [a.shape for a in result[:3]] == [a.shape for a in mx.quantize(weight, bits=bits, group_size=64)]
    assert result.scales.dtype == result.biases.dtype == mx.bfloat16
    assert int(unpack(result.packed, bits).max().item()) < 2**bits
    assert result.error < 0.8 * result.optimal_error


def test_the_reported_error_is_that_of_the_outputs():
    x = correlated_inputs(300, 64)
    weight = mx.random.normal((8, 64), key=mx.random.key(1))
    result = quantize_gptq(weight, x.T @ x, 3, 32)
    w, a = (np.array(v, dtype=np.float64) for v in (weight, dequantize_float32(*result[:3], 3, 32)))
    inputs = np.array(x, dtype=np.float64)
    expected = np.square(inputs @ (w - a).T).sum() / np.square(inputs @ w.T).sum()
    assert result.error == pytest.approx(expected, rel=1e-3)
    assert output_error(weight, dequantize_float32(*result[:3], 3, 32), x.T @ x) == pytest.approx(expected, rel=1e-3)


def test_no_row_is_worse_than_the_start():
    x = correlated_inputs(40, 64)  # fewer inputs than columns: the moments are singular
    weight = mx.random.normal((64, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    h = x.T @ x
    optimal = quantize_affine(weight, 4, 64)
    result = quantize_gptq(weight, h, 4, 64, start=optimal)

    def by_row(arrays):
        error = weight.astype(mx.float32) - dequantize_float32(*arrays, 4, 64)
        return np.array(((error @ h) * error).sum(-1))

    assert (by_row(result[:3]) <= by_row(optimal) * (1 + 1e-4)).all()


def test_more_effort_finds_less_error():
    x = correlated_inputs(512, 128)
    weight = mx.random.normal((16, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    fast, best = (quantize_gptq(weight, x.T @ x, 3, 64, effort=effort).error for effort in ("fast", "best"))
    assert best < fast


def test_two_weights_with_one_dominant_direction_cancel_their_errors():
    """Where inputs always move together, only the sum of their weights' errors matters."""

    h = mx.ones((32, 32)) + 1e-4 * mx.eye(32)
    weight = mx.random.normal((4, 32), key=mx.random.key(1))
    error = weight - dequantize_float32(*quantize_gptq(weight, h, 3, 32)[:3], 3, 32)
    assert mx.abs(error.sum(-1)).max().item() < 0.02
    assert mx.abs(error).max().item() > 0.05


@pytest.mark.parametrize(
    ("shape", "text"),
    [((64, 32), r"Hessian of shape \[64, 32\]"), ((32, 32), r"Hessian of shape \[32, 32\]")],
)
def test_a_hessian_that_does_not_fit_is_refused(shape, text):
    with pytest.raises(QuantizationError, match=text):
        quantize_gptq(mx.ones((4, 64)), mx.ones(shape), 4, 64)


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        quantize_gptq(mx.ones((4, 64)), mx.full((64, 64), float("nan")), 4, 64)


def test_inputs_that_are_always_zero_leave_the_start():
    weight = mx.random.normal((4, 64), key=mx.random.key(1))
    result = quantize_gptq(weight, mx.zeros((64, 64)), 4, 64)
    assert result.error == 0
    assert mx.array_equal(result.packed, quantize_affine(weight, 4, 64)[0]).item()


class Block(nn.Module):
    def __init__(self, dims=64):
        super().__init__()
        self.one, self.two = nn.Linear(dims, dims), nn.Linear(dims, dims)

    def __call__(self, x, mask=None):
        return x + self.two(nn.relu(self.one(x)))


class Tied(nn.Module):
    """A toy language model: blocks in a list, a tied embedding; `chained=False` works on x between the blocks."""

    def __init__(self, chained=True, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.layers = [Block() for _ in range(blocks)]
        self.unused = nn.Linear(64, 64)
        self.chained = chained

    def __call__(self, tokens):
        x = self.embed(tokens)
        mask = mx.zeros((1,))
        for layer in self.layers:
            x = layer(x, mask) if self.chained else layer(x * 1.0, mask)
        return self.embed.as_linear(x)


def tokens(count=8, rows=4):
    mx.random.seed(3)
    return read_batches([mx.random.randint(0, 40, (rows, 17)) for _ in range(count)], "calibration")


def make(chained=True):
    mx.random.seed(0)
    model = Tied(chained)
    mx.eval(model.parameters())
    return model


def linear_paths(model):
    return [(f"layers.{i}.{n}", getattr(model.layers[i], n)) for i in range(len(model.layers)) for n in ("one", "two")]


def test_steps_come_in_the_order_of_the_forward_pass():
    model = make()
    layers = [("embed", model.embed), *linear_paths(model), ("unused", model.unused)]
    steps = forward_steps(partial(tokens(1)[0].inputs.call, model), layers, blocks_of(model))
    assert [(s.path, s.follows, s.like, s.calls) for s in steps] == [
        ("embed", None, "embed", 2),
        ("layers.0", None, "layers.0", 1),
        ("layers.1", "layers.0", "layers.0", 1),
        ("layers.2", "layers.1", "layers.0", 1),
    ]
    assert type(model.layers[0]) is Block


def test_steps_that_do_not_follow_one_another_are_noticed():
    model = make(chained=False)
    steps = forward_steps(partial(tokens(1)[0].inputs.call, model), linear_paths(model), blocks_of(model))
    assert [s.follows for s in steps] == [None, None, None]


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


def test_a_corrected_weight_goes_half_way_to_the_least_squares_solution():
    rng = np.random.default_rng(1)
    before = rng.normal(size=(500, 32)) @ rng.normal(size=(32, 32))
    now = before + 0.3 * rng.normal(size=before.shape)
    w, d = rng.normal(size=(4, 32)), before - now
    solution = np.linalg.lstsq(now, before @ w.T, rcond=None)[0].T
    damping = np.linalg.norm(now) ** 2 / 32 * drift_correction._DAMPING
    solution = w + np.linalg.solve(now.T @ now + damping * np.eye(32), now.T @ d @ w.T).T
    found = corrected(mx.array(w), mx.array(now.T @ now), Drift(mx.array(d.T @ now)))
    np.testing.assert_allclose(np.array(found), (w + solution) / 2, rtol=1e-3, atol=1e-3)


def test_the_error_with_drift_is_that_of_the_outputs():
    rng = np.random.default_rng(2)
    before, w = rng.normal(size=(100, 32)), rng.normal(size=(4, 32))
    now, v = before + 0.1 * rng.normal(size=before.shape), w + 0.1 * rng.normal(size=w.shape)
    d = before - now
    moved = Drift(mx.array(d.T @ now), mx.array(d.T @ d))
    found = drifted_output_error(mx.array(w), mx.array(v), mx.array(now.T @ now), moved)
    wanted = np.square(now @ v.T - before @ w.T).sum() / np.square(before @ w.T).sum()
    assert found == pytest.approx(wanted, rel=1e-4)


def test_blocks_make_up_for_what_those_before_them_lost(monkeypatch):
    twin, found = make(), []
    for share in (0.0, 0.5):
        monkeypatch.setattr(drift_correction, "_SHARE", share)
        model = make()
        gptq_model(model, plan_quantization(model, 2, 64).layers, tokens(32), install=install, blocks_of=blocks_of)
        found.append(sum(mx.square(model(b.shifted[0]) - twin(b.shifted[0])).sum().item() for b in tokens(2)))
    assert found[1] < 0.97 * found[0]


def test_layers_that_are_given_the_same_are_one_stage():
    model = toys.llama(dtype=mx.float32)
    batches = read_batches([mx.random.randint(0, 64, (2, 17))], "calibration")
    modules = dict(model.named_modules())
    layers = {path: m for path, m in modules.items() if isinstance(m, nn.Linear)}
    steps = forward_steps(partial(batches[0].inputs.call, model), list(layers.items()), blocks_of(model))
    inputs = Propagation(model, batches, steps, running)
    step = next(s for s in steps if s.path == "model.layers.0")
    inputs.enter(step)
    mine = {path: m for path, m in layers.items() if path.startswith("model.layers.0.")}
    stages = [sorted(path.rpartition(".")[2] for path in stage) for stage in inputs.stages(step, mine)]
    assert stages == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_layers_learn_from_quantized_ones_of_their_own_block(monkeypatch):
    twin, found = make(), []
    for staged in (True, False):
        if not staged:
            monkeypatch.setattr(Propagation, "stages", lambda self, step, modules: [list(modules)])
        model = make()
        gptq_model(model, plan_quantization(model, 2, 64).layers, tokens(32), install=install, blocks_of=blocks_of)
        found.append(sum(mx.square(model(b.shifted[0]) - twin(b.shifted[0])).sum().item() for b in tokens(2)))
    assert found[0] < 0.99 * found[1]


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


def test_running_stops_where_it_has_seen_enough():
    model = make()
    seen = []

    def hook(call):
        seen.append(call.inputs.shape)

    run_until(partial(tokens(1)[0].inputs.call, model), model.layers[1], 1, hook)
    assert seen == [(4, 16, 64)]
    assert type(model.layers[1]) is Block


@pytest.mark.parametrize("chained", [True, False])
def test_a_model_is_quantized_block_by_block(chained):
    model, twin = make(chained), make(chained)
    batches = tokens()
    layers = plan_quantization(model, 2, 64).layers
    done = gptq_model(model, layers, batches, install=install, blocks_of=blocks_of)
    assert [layer.path for layer in done] == [layer.path for layer in layers]
    by_path = {layer.path: layer for layer in done}
    assert by_path["unused"].method == "optimal"
    assert by_path["unused"].note == "kept 'optimal': no calibration input reached it"
    assert sum(layer.method == "gptq" for layer in done) >= 5
    assert all(x.output_error <= x.optimal_output_error for x in done if x.output_error is not None)

    def loss(m):
        return sum(mx.square(m(b.shifted[0]) - twin(b.shifted[0])).sum().item() for b in tokens(2))

    plain = make(chained)
    for layer in plan_quantization(plain, 2, 64).layers:
        weight = layer.module.weight
        install(layer, quantize_affine(weight, 2, 64))
    assert loss(model) < 0.8 * loss(plain)


def test_one_large_batch_is_as_good_as_many_small_ones(monkeypatch):
    monkeypatch.setattr(passes, "_PART_TOKENS", 4 * 17)
    many = tokens(10)
    one = read_batches([mx.concatenate([batch.tokens for batch in many])], "calibration")
    found = []
    for calibration in (many, one):
        model = make()
        done = gptq_model(
            model, plan_quantization(model, 3, 64).layers, calibration, install=install, blocks_of=blocks_of
        )
        found.append((done, model.layers[2].two.weight))
    assert found[0][0] == found[1][0]
    assert mx.array_equal(found[0][1], found[1][1]).item()


def test_both_ways_of_running_blocks_learn_the_same(monkeypatch):
    """Calling blocks one after the other sees what running the whole, partly quantized model would show."""
    # How far inputs have moved, and what layers of the same block hand on, is known in one of both ways only.
    monkeypatch.setattr(drift_correction, "_SHARE", 0)
    monkeypatch.setattr(Propagation, "stages", lambda self, step, modules: [list(modules)])
    found = []
    for chained in (True, False):
        model = make(chained)
        gptq_model(model, plan_quantization(model, 4, 64).layers, tokens(3), install=install, blocks_of=blocks_of)
        found.append(dict(tree_flatten(model.parameters())))
    for name, array in found[0].items():
        if "scales" in name:
            assert mx.allclose(array, found[1][name], rtol=1e-2, atol=1e-3).item(), name


def test_a_layer_that_does_not_gain_keeps_the_start(monkeypatch):
    monkeypatch.setattr(passes, "_error", lambda *_: 1.0)
    model = make()
    done = gptq_model(model, plan_quantization(model, 4, 64).layers, tokens(2), install=install, blocks_of=blocks_of)
    assert {layer.method for layer in done} == {"optimal"}
    assert any("gptq's output error was 1 against 1" in (layer.note or "") for layer in done)


def test_lookups_alone_have_nothing_to_correct():
    mx.random.seed(0)
    model = nn.Sequential(nn.Embedding(40, 64), nn.Linear(64, 8))
    done = gptq_model(model, plan_quantization(model, 4, 64).layers, tokens(2), install=install, blocks_of=blocks_of)
    assert done[0].method == "optimal"
    assert "lookups only" in done[0].note


def test_experts_are_solved_one_by_one():
    from mlx_lm.models.switch_layers import SwitchGLU

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = SwitchGLU(64, 64, 3)

        def __call__(self, x):
            chosen = (mx.arange(x.shape[0])[:, None] + mx.arange(2)[None]) % 3
            return self.experts(x, chosen).sum(-2)

    mx.random.seed(0)
    model = Routed()
    x = correlated_inputs(8 * 64, 64).reshape(8, 64, 64)
    batches = read_batches(list(x), "calibration")
    layers = plan_quantization(model, 3, 64).layers
    done = gptq_model(model, layers, batches, install=install, blocks_of=blocks_of)
    assert {layer.path: layer.method for layer in done}["experts.up_proj"] == "gptq"
    assert type(model.experts.up_proj).__name__ == "QuantizedSwitchLinear"


def test_no_batches_are_an_error():
    with pytest.raises(QuantizationError, match="calibration is empty"):
        gptq_model(make(), [], [], install=install, blocks_of=blocks_of)


def test_a_layer_keeps_nearest_where_its_outputs_lose_least_with_it(monkeypatch):
    real = passes.pack_weight

    def coarse(weight, wanted, method, *more):
        """Stand in for a search that went wrong."""
        (packed, scales, biases), used = real(weight, wanted, method, *more)
        return (packed, scales * (1.5 if method == "optimal" else 1), biases), used

    monkeypatch.setattr(passes, "pack_weight", coarse)
    monkeypatch.setattr(passes, "quantize_gptq", lambda *_, start, **__: (*start, 0.0, 0.0))
    model = nn.Sequential(nn.Linear(64, 32))
    before = model.layers[0].weight
    batches = read_batches([correlated_inputs(32, 64, seed) for seed in range(4)], "calibration")
    layers = plan_quantization(model, 3, 64).layers
    (done,) = gptq_model(model, layers, batches, install=install, blocks_of=blocks_of)
    assert done.method == "nearest"
    assert "kept 'nearest': gptq's output error was" in done.note
    assert mx.array_equal(model.layers[0].weight, mx.quantize(before, 64, 3)[0]).item()
