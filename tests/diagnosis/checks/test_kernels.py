import math

import mlx.core as mx

from mlx_tune.devices import backend
from mlx_tune.diagnosis.checks import kernels
from mlx_tune.quantization.planning import kernel_trials


def test_packed_products_in_the_shapes_of_common_models_are_right_here():
    result = kernels.quantized_kernels.run()
    assert result.figures["tried"] == len(kernels.SHAPES)
    if backend() == "cuda":  # its kernel for 4 bits is wrong at narrow inputs: docs/upstream.md
        [fault] = result.figures["faults"]
        assert "product of 64 inputs in 4 bits" in fault
        return
    assert result.status == "pass"
    assert result.summary.startswith(f"{len(kernels.SHAPES)} kinds of packed weights")
    assert result.figures["faults"] == []


def test_a_wrong_one_is_named_with_the_way_out(monkeypatch):
    def multiply(inputs, *arrays, **parts):
        right = mx.quantized_matmul(inputs, *arrays, **parts)
        return right + 1000 if inputs.shape == (8, 64) else right

    monkeypatch.setattr(kernel_trials, "MLX", kernel_trials.Kernels(multiply=multiply))
    result = kernels.quantized_kernels.run()
    assert result.status == "warn"
    assert "product of 64 inputs in 4 bits, group 64, bfloat16 at 8 rows is wrong" in result.summary
    assert "lm.load" in result.fix
    assert len(result.figures["faults"]) == 1


def test_several_wrong_ones_are_counted(monkeypatch):
    monkeypatch.setattr(kernel_trials, "MLX", kernel_trials.Kernels(multiply=lambda x, *arrays, **parts: x * math.nan))
    products = sum(use == "product" for use, *_ in kernels.SHAPES)
    result = kernels.quantized_kernels.run()
    assert result.summary.endswith(f"and {products - 1} more of {len(kernels.SHAPES)}")
    assert len(result.figures["faults"]) == products


def test_a_missing_one_is_named_in_mlxs_words(monkeypatch):
    def gather(*arrays, **parts):
        raise RuntimeError("[gather_qmm] No implementation for problem shape")

    monkeypatch.setattr(kernel_trials, "MLX", kernel_trials.Kernels(gather=gather))
    result = kernels.quantized_kernels.run()
    assert result.status == "warn"
    assert any("No implementation for problem shape" in fault for fault in result.figures["faults"])
