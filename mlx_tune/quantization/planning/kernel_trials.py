"""Multiplying with made-up packed weights on the device, and comparing with the dequantized product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_tune import devices
from mlx_tune.quantization.formats.packing import unpack
from mlx_tune.quantization.planning.kernels import MANY_ROWS, Combination, Fault, KernelTrial, judge
from mlx_tune.units import number

#: Matrices of a stack that are tried: two, so that a wrong one can be picked, and so few that eight rows in order are
#: four a matrix, from where on Metal has a kernel of their own.
_STACK = 2

#: Outputs that are compared: so many at either end, and as many in between.
_COMPARED = 32


@dataclass(frozen=True)
class Kernels:
    """The functions under trial, called as MLX's layers call them.

    Attributes:
        multiply: As `mx.quantized_matmul`.
        gather: As `mx.gather_qmm`.
        dequantize: As `mx.dequantize`.
        multiply_both: As `mx.qqmm`, which quantizes the inputs too.
    """

    multiply: Callable[..., mx.array] = mx.quantized_matmul
    gather: Callable[..., mx.array] = mx.gather_qmm
    dequantize: Callable[..., mx.array] = mx.dequantize
    multiply_both: Callable[..., mx.array] = mx.qqmm


#: Those of MLX. Tests put faulty ones in their place.
MLX = Kernels()

_verdicts: dict[tuple[Kernels, str, Combination], Fault | None] = {}


def fault_in(combination: Combination) -> Fault | None:
    """The fault of MLX's kernels with a combination on the default device, found once in a process.

    Examples:
        >>> from mlx_tune.quantization.formats.modes import Format
        >>> print(fault_in(Combination("product", 128, 32, Format(4, 64), "float32")))
        None
    """
    key = MLX, str(mx.default_device()), combination
    if key not in _verdicts:
        kernels = MLX
        _verdicts[key] = judge(combination, lambda tried, trial: measure(tried, trial, kernels), default_backend())
    return _verdicts[key]


def default_backend() -> devices.Backend:
    """The backend of the default device: on a machine with a GPU, the processor where work was sent there."""
    return "cpu" if devices.computes_on_cpu() else devices.machine().backend


def measure(combination: Combination, trial: KernelTrial, kernels: Kernels = MLX) -> float:
    """The relative error of one multiplication: the worst row's, as the root of its mean square.

    The reference is computed on the processor in float32, where no backend shortens the factors.

    Args:
        combination: The factors.
        trial: The rows.
        kernels: The functions that multiply.

    Raises:
        RuntimeError: MLX has no kernel for it.
    """
    with mx.stream(mx.cpu):
        packed, scales, biases = _weights(combination)
        inputs, picked = _inputs(combination, trial)
        mx.eval(packed, scales, biases, inputs, picked)
    result = _multiply(combination, trial, kernels, (packed, scales, biases), inputs, picked)
    mx.eval(result)
    with mx.stream(mx.cpu):
        outputs = mx.array(_compared(combination))
        weights = _numbers(combination, packed, scales, biases, outputs)
        rows = result.astype(mx.float32)
        if combination.use == "lookup":
            expected = weights
        else:
            seen = _as_multiplied(combination, inputs).astype(mx.float32)
            if combination.use == "gathered":
                weights = weights[picked]
            expected, rows = seen @ weights.swapaxes(-1, -2), rows[..., outputs]
        off, size = (mx.square(part).mean(-1) for part in (rows - expected, expected))
        return number(mx.sqrt(off / size).max())


def _multiply(
    combination: Combination,
    trial: KernelTrial,
    kernels: Kernels,
    arrays: tuple[mx.array, mx.array, mx.array | None],
    inputs: mx.array,
    picked: mx.array,
) -> mx.array:
    """The kernel's result: [rows, outputs], with a leading axis or a middle one for a stack."""
    packed, scales, biases = arrays
    parts: dict[str, object] = combination.format.keywords()
    if combination.use == "lookup":
        return kernels.dequantize(packed, scales=scales, biases=biases, **parts)
    if combination.use == "gathered":
        return kernels.gather(
            inputs, packed, scales, biases, rhs_indices=picked, transpose=True, sorted_indices=trial.in_order, **parts
        )
    if combination.format.quantize_input:
        return kernels.multiply_both(inputs, packed, scales=scales, **parts)
    return kernels.multiply(inputs, packed, scales=scales, biases=biases, transpose=True, **parts)


def _weights(combination: Combination) -> tuple[mx.array, mx.array, mx.array | None]:
    """Random packed weights of about unit size. Codes are drawn, since quantizing so many numbers would take longer."""
    wanted, keys = combination.format, mx.random.split(mx.random.key(combination.inputs), 3)
    shape: tuple[int, ...] = (combination.outputs,)
    if combination.use in ("batched", "gathered"):
        shape = (_STACK, *shape)
    words = (*shape, combination.inputs * wanted.bits // 32)
    packed = mx.random.randint(-(2**31), 2**31 - 1, words, dtype=mx.int32, key=keys[0]).view(mx.uint32)
    groups = (*shape, combination.inputs // wanted.group_size)
    if wanted.mode != "affine":
        # Without the exponent's last bit no code of eight bits is NaN.
        packed = packed & 0xF7F7F7F7 if wanted.mode == "mxfp8" else packed
        low, high = (0x28, 0x30) if wanted.mode == "nvfp4" else (119, 122)
        return packed, mx.random.randint(low, high, groups, key=keys[1]).astype(mx.uint8), None
    dtype = getattr(mx, wanted.scale_dtype or combination.dtype)
    scales = mx.random.uniform(2, 6, groups, key=keys[1]) / (2**wanted.bits - 1)
    return packed, scales.astype(dtype), mx.random.uniform(-3, -1, groups, key=keys[2]).astype(dtype)


def _inputs(combination: Combination, trial: KernelTrial) -> tuple[mx.array, mx.array]:
    """Rows as the layer gets them, and the matrix that each row picks."""
    rows = trial.rows
    shape: tuple[int, ...] = (rows, combination.inputs)
    if combination.use == "batched":
        shape = (_STACK, *shape)
    elif combination.use == "gathered":
        shape = (rows, 1, combination.inputs)
    inputs = mx.random.normal(shape, key=mx.random.key(rows)).astype(getattr(mx, combination.dtype))
    # The last matrix comes first: with one row, a kernel that always takes the first would not be noticed.
    order = [i * _STACK // rows if trial.in_order else _STACK - 1 - i % _STACK for i in range(rows)]
    return inputs, mx.array(order, dtype=mx.uint32)


def _compared(combination: Combination) -> list[int]:
    """Outputs to compare: both ends, where tiles end, and a spread of the others."""
    count = MANY_ROWS if combination.use == "lookup" else combination.outputs
    spread = range(0, count, max(1, count // _COMPARED))
    return sorted({*range(min(count, _COMPARED)), *range(max(0, count - _COMPARED), count), *spread})


def _numbers(
    combination: Combination, packed: mx.array, scales: mx.array, biases: mx.array | None, outputs: mx.array
) -> mx.array:
    """The weights of some outputs in float32; in mode "affine" without MLX's own kernels."""
    wanted = combination.format
    packed, scales = (mx.take(array, outputs, axis=-2) for array in (packed, scales))
    if biases is None:
        return mx.dequantize(packed, scales, dtype=mx.float32, **wanted.keywords())
    scale, bias = scales.astype(mx.float32), mx.take(biases, outputs, axis=-2).astype(mx.float32)
    codes = unpack(packed, wanted.bits).astype(mx.float32).reshape(*scale.shape, wanted.group_size)
    return (codes * scale[..., None] + bias[..., None]).flatten(-2)


def _as_multiplied(combination: Combination, inputs: mx.array) -> mx.array:
    """The inputs that a product sees: quantized, where the layer quantizes them."""
    if not combination.format.quantize_input:
        return inputs
    parts: dict[str, Any] = combination.format.keywords()
    return mx.dequantize(*mx.quantize(inputs, **parts), dtype=mx.float32, **parts)
