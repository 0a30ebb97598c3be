"""Weights at the edges of what their dtype, and that of their scales, can hold."""

import math
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import quantization_toys as toys
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_tune.devices import backend
from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.dry_run import plan_quantization
from mlx_tune.quantization.formats.affine import group_errors, quantize_affine
from mlx_tune.quantization.formats.modes import AFFINE_BITS, FIXED_MODES
from mlx_tune.quantization.models.layers import is_quantized
from mlx_tune.quantization.models.sites import WalkedModel
from mlx_tune.quantization.quantize import quantize_model


def two_layers(weight: mx.array) -> nn.Module:
    """One of that weight, and an ordinary one."""
    made = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False))
    made.layers[0].weight = weight
    made.layers[1].weight = (0.1 * mx.random.normal((128, 128), key=mx.random.key(1))).astype(weight.dtype)
    return made


ORDINARY = mx.random.uniform(-1, 1, (128, 128), key=mx.random.key(0))
CALIBRATION = [mx.random.normal((4, 128), key=mx.random.key(i)) for i in range(3)]


@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**50])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("arguments", [
    {"bits": 1}, {"bits": 4}, {"bits": 8}, {"mode": "mxfp4"}, {"mode": "mxfp8"},
    {"bits": 3, "method": "gptq"}, {"bits": 3, "method": "dwq"}, {"target_bpw": 5.0},
], ids=str)  # fmt: skip
def test_a_layer_loses_as_little_at_any_magnitude(arguments: dict, dtype: mx.Dtype, magnitude: float) -> None:
    calibration = CALIBRATION if "method" in arguments else None
    plain, found = (
        quantize_model(
            two_layers(weight.astype(dtype)), **arguments, calibration=calibration, verify_kernels=False, progress=False
        )
        for weight in (ORDINARY, ORDINARY * magnitude)
    )
    assert found.layers[0].snr_db > plain.layers[0].snr_db - 0.5


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("method", ["nearest", "optimal"])
@pytest.mark.parametrize("magnitude", [1e-40, 1e-38, 1e38])
def test_modes_of_floats_give_decibels_at_the_edges(mode: str, method: str, magnitude: float) -> None:
    report = quantize_model(two_layers(ORDINARY * magnitude), mode=mode, method=method, progress=False)
    assert not math.isnan(report.layers[0].snr_db)
    assert method == "nearest" or report.layers[0].snr_db >= 0


def test_inputs_that_overflow_name_their_layer() -> None:
    with pytest.raises(QuantizationError, match=r"layers\.1 was given calibration inputs .* whose squares are not"):
        quantize_model(two_layers(1e30 * ORDINARY), method="gptq", calibration=CALIBRATION, progress=False)


# Numbers that the dtype of the scales does not hold


def with_outliers(dtype: mx.Dtype, most: float) -> mx.array:
    weight = 0.1 * ORDINARY
    weight[0, 0], weight[0, 1] = most, -most
    return weight.astype(dtype)


class Experts(nn.Module):
    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.up = SwitchLinear(128, 128, 2, bias=False)
        self.up.weight = mx.stack([0.1 * ORDINARY.astype(weight.dtype), weight])

    def __call__(self, x: mx.array) -> mx.array:
        return self.up(x[:, None, None], mx.arange(x.shape[0])[:, None] % 2)


def embedding_of(weight: mx.array) -> nn.Module:
    made = nn.Embedding(128, 128)
    made.weight = weight
    return made


MODELS: dict[str, Callable[[mx.array], nn.Module]] = {
    "linear": two_layers,
    "experts": Experts,
    "embedding": lambda weight: nn.Sequential(embedding_of(weight)),
}


def packed_layers(model: nn.Module) -> list[Any]:
    return [site.module for site in WalkedModel(model).sites if is_quantized(site.module)]


def unpacks(model: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether MLX unpacks every packed layer to finite numbers, from finite scales."""
    for layer in packed_layers(model):
        biases = layer.get("biases")
        target = dtype if biases is None else None
        found = mx.dequantize(
            layer.weight, layer.scales, biases, layer.group_size, layer.bits, layer.mode, dtype=target
        )
        if not mx.isfinite(found).all().item():
            return False
    return True


#: Layers in one bit are left unpacked on CUDA, which has no kernel for them: docs/upstream.md.
not_on_cuda = pytest.mark.skipif(backend() == "cuda", reason="CUDA cannot pack in 1 bit: docs/upstream.md")


FORMATS = [
    *(
        pytest.param({"bits": bits, "method": method}, marks=not_on_cuda if bits == 1 else ())
        for bits in AFFINE_BITS
        for method in ("nearest", "optimal")
    ),
    *({"mode": mode, "method": method} for mode in FIXED_MODES for method in ("nearest", "optimal")),
]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("arguments", FORMATS, ids=str)
def test_what_would_overflow_is_refused_by_name_or_stored_in_range(arguments: dict, make: Callable) -> None:
    for dtype, most in ((mx.float16, 40000.0), (mx.float16, 65504.0), (mx.bfloat16, 3e38), (mx.float32, 3e38)):
        model = make(with_outliers(dtype, most))
        before = toys.arrays_of(model)
        try:
            report = quantize_model(model, **arguments, progress=False)
        except QuantizationError as error:
            refusal = str(error)
            assert toys.same_arrays(before, toys.arrays_of(model))
        else:
            refusal = None
            assert unpacks(model, dtype)
            assert all(not math.isnan(layer.snr_db) for layer in report.layers)
        assert refusal is None or re.match(r"(layers\.0|up) would overflow in .* Nothing was changed: ", refusal)


@pytest.mark.parametrize("method", ["gptq", "dwq"])
def test_methods_that_learn_refuse_it_before_they_start(method: str) -> None:
    model = two_layers(with_outliers(mx.float16, 40000.0))
    with pytest.raises(
        QuantizationError, match=r"layers\.0 would overflow in 4 bits, group 64: float16 ends at 65,504"
    ):
        quantize_model(model, 4, 64, method=method, calibration=CALIBRATION, progress=False)


@pytest.mark.parametrize(
    "arguments", [{"bits": 4}, {"bits": 8, "method": "nearest"}, pytest.param({"bits": 1}, marks=not_on_cuda)], ids=str
)
def test_wider_scales_hold_it(arguments: dict) -> None:
    model = two_layers(with_outliers(mx.float16, 40000.0))
    quantize_model(model, **arguments, scale_dtype="bfloat16", progress=False)
    assert unpacks(model, mx.float16)


def test_a_target_leaves_out_formats_that_overflow() -> None:
    model = two_layers(with_outliers(mx.float16, 40000.0))
    quantize_model(model, target_bpw=12.6, progress=False)
    assert unpacks(model, mx.float16)


def test_the_plan_says_that_float16_ends() -> None:
    model = two_layers(with_outliers(mx.float16, 40000.0))
    assert "float16 ends at 65,504: should one of the 2 layers" in str(plan_quantization(model))
    assert "65,504" not in " ".join(plan_quantization(two_layers(ORDINARY)).notes)


# The dtype of scales


@pytest.mark.parametrize("method", ["nearest", "optimal", "gptq", "dwq"])
@pytest.mark.parametrize("scales", [mx.bfloat16, "float16"])
def test_scales_have_the_dtype_that_was_asked_for(method: str, scales: mx.Dtype | str) -> None:
    model = two_layers(ORDINARY)
    arguments = {"method": method, "scale_dtype": scales, "calibration": CALIBRATION}
    plan = plan_quantization(model, 4, 64, **{**arguments, "calibration": None})
    report = quantize_model(model, 4, 64, **arguments, progress=False)
    wanted = mx.float16 if scales == "float16" else mx.bfloat16
    assert all(layer.scales.dtype == layer.biases.dtype == wanted for layer in packed_layers(model))
    assert report.bits_per_weight == plan.bits_per_weight == pytest.approx(4.5)
    assert report.size_after_bytes == sum(a.nbytes for a in toys.arrays_of(model).values())


def test_a_search_for_narrow_scales_judges_them_as_stored() -> None:
    weight = mx.random.normal((64, 256), key=mx.random.key(5))
    for bits in (2, 4, 8):
        found = quantize_affine(weight, bits, 64, scale_dtype=mx.bfloat16)
        theirs = mx.quantize(weight.astype(mx.bfloat16), 64, bits)
        assert found[1].dtype == mx.bfloat16
        before, after = (group_errors(weight, *arrays, bits, 64) for arrays in (theirs, found))
        assert (after <= before * (1 + 1e-4)).all().item()


def test_float32_scales_are_said_with_their_bytes() -> None:
    model = two_layers(ORDINARY)
    plan = plan_quantization(model, 4, 64)
    text = "Scales and biases of 2 layers are float32: in bfloat16, with scale_dtype='bfloat16', they would take"
    assert any(text in note for note in plan.notes)
    assert any(text in note for note in quantize_model(model, 4, 64, progress=False).notes)
    narrow = plan_quantization(two_layers(ORDINARY), 4, 64, scale_dtype="bfloat16")
    assert plan.size_after_bytes - narrow.size_after_bytes == 2 * 128 * 2 * 2 * 2
    assert not any("float32" in note for note in narrow.notes)
    assert narrow.layers[0].format is not None
    assert str(narrow.layers[0].format) == "4 bits, group 64, bfloat16 scales"


def test_a_target_counts_the_scales_as_they_will_be() -> None:
    model = two_layers(ORDINARY)
    report = quantize_model(model, target_bpw=4.5, scale_dtype=mx.bfloat16, progress=False)
    assert report.bits_per_weight <= 4.5
    assert all(layer.scales.dtype == mx.bfloat16 for layer in packed_layers(model) if layer.mode == "affine")


@pytest.mark.parametrize("given", ["int8", mx.int32, "bf16", 16])
def test_scales_of_another_dtype_are_refused(given: Any) -> None:
    with pytest.raises(QuantizationError, match=r"scale_dtype=.*float32, bfloat16, float16, or None"):
        plan_quantization(two_layers(ORDINARY), scale_dtype=given)
