"""What the library leans on in Metal: the same tests against the stand-in anywhere, and against an Apple GPU on one.

Those that need the GPU are marked `metal` and skip elsewhere, with the reason; see `conftest.py`. Where one of them
fails on a Mac, the stand-in of `metal_stand_in.py` is wrong about Metal, and with it whatever was built on it.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from metal_stand_in import MetalStandIn

import mlx_tune as mt
from mlx_tune import devices
from mlx_tune.wiring.limits import read_capacity

MIB = 2**20


def limit_now() -> int:
    """The wired limit: MLX has no getter, but setting one returns the one before."""
    limit = mx.set_wired_limit(0)
    mx.set_wired_limit(limit)
    return limit


@pytest.fixture(params=["stand-in", pytest.param("Apple GPU", marks=pytest.mark.metal)])
def recommended(request, monkeypatch):
    """The recommended working set of a Mac on which memory can be wired."""
    if request.param == "stand-in":
        MetalStandIn().install(monkeypatch)
        monkeypatch.setattr(devices, "macos_version", lambda: (15, 4))
    capacity = read_capacity()
    if capacity.reason:
        pytest.skip(capacity.reason)
    before = limit_now()
    yield capacity.recommended_bytes
    assert limit_now() == before, "every test here leaves the limit as it was"


@pytest.fixture
def model():
    """A megabyte of weights."""
    model = nn.Linear(512, 512, bias=False)
    mx.eval(model.parameters())
    return model


def test_the_device_says_what_the_library_reads(recommended):
    info = mx.device_info()
    assert 0 < recommended == info["max_recommended_working_set_size"] < info["memory_size"]
    assert devices.machine().backend == "metal"
    assert devices.machine().working_set_bytes == recommended


def test_setting_the_limit_returns_the_one_before(recommended):
    before = mx.set_wired_limit(3 * MIB)
    assert mx.set_wired_limit(5 * MIB) == 3 * MIB
    assert mx.set_wired_limit(before) == 5 * MIB


def test_only_what_is_above_the_recommended_size_is_refused(recommended):
    before = mx.set_wired_limit(recommended)
    mx.set_wired_limit(before)
    with pytest.raises(ValueError, match="wired limit larger than the maximum"):
        mx.set_wired_limit(recommended + 1)
    for wrong in (-1, 1.5):
        with pytest.raises(TypeError):
            mx.set_wired_limit(wrong)
    assert limit_now() == before, "a refusal changes nothing"


def test_a_model_is_wired_with_its_headroom(recommended, model):
    before = limit_now()
    with mt.wired_limit(model, headroom="50%") as wired:
        assert wired.applied, wired.reason
        assert limit_now() == wired.limit_bytes == max(before, MIB + MIB // 2)
        mx.eval(model(mx.ones((4, 512))))
    assert limit_now() == before


def test_blocks_that_overlap_share_the_limit_and_leave_none(recommended, model):
    before = limit_now()
    first, second = mt.wired_limit(model, 0), mt.wired_limit(2 * MIB)
    first.__enter__()
    second.__enter__()
    assert limit_now() == max(before, 3 * MIB)
    first.__exit__(None, None, None)
    assert limit_now() == max(before, 2 * MIB)
    second.__exit__(None, None, None)
    assert limit_now() == before


def test_an_exception_ends_the_block_and_comes_through(recommended, model):
    before = limit_now()
    with pytest.raises(KeyError, match="mine"), mt.wired_limit(model, streams=[mx.default_stream(mx.default_device())]):
        raise KeyError("mine")
    assert limit_now() == before


def test_more_than_may_be_wired_is_cut_with_a_reason(recommended):
    with mt.wired_limit(4 * recommended) as wired:
        assert 0 < wired.limit_bytes <= recommended
        assert "may wire" in wired.reason


def test_the_block_of_mlx_lm_nests_inside(recommended, model):
    from mlx_lm.generate import wired_limit as mlx_lm_wired_limit

    before = limit_now()
    with mt.wired_limit(model) as wired:
        with mlx_lm_wired_limit(model):
            pass
        assert limit_now() == wired.limit_bytes
    assert limit_now() == before


@pytest.mark.metal
def test_the_footprint_is_what_the_arrays_take():
    before = devices.footprint_bytes()
    arrays = [mx.random.normal((1024, 1024)) for _ in range(32)]
    mx.eval(arrays)
    assert devices.footprint_bytes() - before > 0.9 * 128 * MIB


@pytest.mark.metal
def test_dropout_has_the_plain_gradient_under_a_checkpoint():
    mx.random.seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.ReLU()) for _ in range(3)])
    x = mx.random.normal((32, 64))
    report = mt.verify_checkpoint(model, lambda model, x: model(x).square().mean(), x)
    assert report.ok, str(report)


@pytest.mark.metal
def test_a_batch_that_was_found_trains_within_its_budget():
    model, optimizer = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)), optim.AdamW(1e-3)
    gradients_of = nn.value_and_grad(model, lambda x: (model(x) - x).square().mean())

    def step(x):
        loss, gradients = gradients_of(x)
        optimizer.update(model, gradients)
        return loss

    def make_batch(n):
        return mx.random.normal((n, 64, 256))

    state = (model, optimizer)
    result = mt.autobatch(step, make_batch, budget="300MB", max_batch=256, state=state, progress=False)
    with result.applied(), mt.track_memory() as memory:
        for _ in range(3):
            mx.eval(step(make_batch(result.batch_size)), model.parameters(), optimizer.state)
    assert result.batch_size >= 1
    assert memory.peak_bytes <= result.budget_bytes


@pytest.mark.metal
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_packed_weights_multiply_as_the_report_reckons(bits):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(256, 128, bias=False))
    mt.quantize_model(model, bits, 64, progress=False)
    layer, x = model.layers[0], mx.random.normal((4, 256))
    weight = mx.dequantize(layer.weight, layer.scales, layer.biases, 64, bits)
    expected = np.array(x, dtype=np.float64) @ np.array(weight, dtype=np.float64).T
    np.testing.assert_allclose(np.array(layer(x)), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.metal
def test_the_doctor_finds_the_gpu_sound():
    diagnosis = mt.diagnose(only=["gpu-present", "kernel-gpu", "default-device", "working-set"])
    assert diagnosis.ok, str(diagnosis)
