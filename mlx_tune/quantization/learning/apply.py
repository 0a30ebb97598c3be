"""Carrying a plan out: packed arrays into modules, modules into the model, and what each layer lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import BackendError, QuantizationError
from mlx_tune.quantization.formats.lazy import number, read_array
from mlx_tune.quantization.formats.magnitudes import largest_magnitude
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.formats.scale_search import Effort
from mlx_tune.quantization.models.arithmetic import same_random_stream
from mlx_tune.quantization.models.dense import dense_twin, dequantize_arrays
from mlx_tune.quantization.models.sites import module_at, own_arrays
from mlx_tune.quantization.models.transaction import original, swap
from mlx_tune.quantization.planning.plan import LayerPlan, QuantizationPlan

#: Packed weights, scales, and biases where the mode has them.
PackedArrays = tuple[mx.array, mx.array, mx.array | None]

#: Weights looked at together where a whole layer would need several float32 copies of itself at once.
#: A GPU has more room and waits longer for each piece to end.
_CHUNK_WEIGHTS, _CHUNK_WEIGHTS_GPU = 1 << 19, 1 << 22


@dataclass(frozen=True)
class LayerOutcome:
    """The outcome of a layer.

    Attributes:
        path: Where it stands first.
        method: The method by which its codes were found: "nearest", "optimal", "gptq" or "dwq".
        snr_db: Power of the weights over the power of their error, in decibels; infinite where nothing was lost.
        output_error: Squared error of its outputs over their squares, measured on calibration; None if it was not.
        optimal_output_error: The same had it been quantized by "optimal".
        note: Further remarks, such as a fallback with its reason.
        input_snr_db: As `snr_db`, each input counted by its energy; None where that is not known.
    """

    path: str
    method: str
    snr_db: float
    output_error: float | None = None
    optimal_output_error: float | None = None
    note: str | None = None
    input_snr_db: float | None = None


def pack(
    weight: mx.array, wanted: Format, method: str, effort: Effort = "fast", energy: mx.array | None = None
) -> tuple[PackedArrays, str]:
    """Packed weights, and the method that was used.

    Args:
        weight: [..., outputs, inputs].
        wanted: The format.
        method: "nearest" or "optimal".
        effort: "fast" or "best".
        energy: The weight of a squared error in each column for "optimal", `[inputs]`; all alike by default.
    """
    scale_dtype = getattr(mx, wanted.scale_dtype) if wanted.scale_dtype else weight.dtype
    if method == "optimal" and wanted.mode == "affine":
        from mlx_tune.quantization.formats.affine import quantize_affine

        found = quantize_affine(
            weight, wanted.bits, wanted.group_size, effort=effort, importance=energy, scale_dtype=scale_dtype
        )
        return found, "optimal"
    if method == "optimal":
        from mlx_tune.quantization.formats.float_modes import quantize_float

        return (*quantize_float(weight, wanted.mode, effort=effort), None), "optimal"
    packed, scales, *biases = mx.quantize(weight.astype(scale_dtype), **wanted.parts())
    return (packed, scales, biases[0] if biases else None), "nearest"


def install(layer: LayerPlan, arrays: PackedArrays) -> None:
    """Put packed arrays in every place of a planned layer: tied modules share them.

    Args:
        layer: A layer of a plan, with a format.
        arrays: Its packed weights, scales and biases.
    """
    assert layer.format is not None
    made: dict[int, nn.Module] = {}
    olds = [module_at(layer.model, path) for path in layer.paths]
    for path, old in zip(layer.paths, olds, strict=True):
        if id(old) not in made:
            made[id(old)] = quantized_module(old, layer.format, arrays)
        swap(layer.model, path, made[id(old)])


def quantized_module(module: nn.Module, wanted: Format, arrays: PackedArrays) -> nn.Module:
    """The quantized counterpart of a module around given arrays.

    Args:
        module: An unquantized module, or a quantized one that is quantized anew.
        wanted: The format of the arrays.
        arrays: Packed weights, scales and biases.

    Returns:
        A module of the class that MLX or mlx-lm use for it, with the module's own bias, training flag and frozen bias.

    Raises:
        BackendError: Inputs are to be quantized too, and this backend cannot.
    """
    dense = dense_twin(module)
    shell_weight = dense["weight"]
    hollow = _hollow_copy(dense, shell_weight)
    options: dict[str, object] = {"group_size": wanted.group_size, "bits": wanted.bits}
    if wanted.mode != "affine":
        options["mode"] = wanted.mode
    if wanted.quantize_input:
        options["quantize_input"] = True
        hollow._training = False  # in training mode MLX's layer would keep, and use, unquantized weights
    # MLX's constructors draw random weights first: never evaluated, but the stream must not move.
    with same_random_stream():
        made: nn.Module = hollow.to_quantized(**options)
    weight, scales, biases = arrays
    made["weight"], made["scales"] = weight, scales
    if biases is not None:
        made["biases"] = biases
    made._no_grad = set(made._no_grad) | (set(module._no_grad) & set(made))
    if not wanted.quantize_input:
        made._training = module._training
    return made


def signal_to_noise_db(weight: mx.array, arrays: PackedArrays, wanted: Format, energy: mx.array | None = None) -> float:
    """10 log10 of the weights' power over that of their error, reconstructed in float32.

    Args:
        weight: The weights before.
        arrays: The packed ones.
        wanted: Their format.
        energy: The weight of a square in each column, `[inputs]`; all alike by default.

    Returns:
        Decibels; `inf` where the error is zero.
    """
    return _decibels(weight, unpacked(arrays, wanted), energy)


def unpacked(arrays: PackedArrays, wanted: Format) -> Callable[[slice], mx.array]:
    """A function from rows, over all leading axes together, to the weights that packed arrays stand for, in float32."""
    packed, scales, biases = arrays

    def after(rows: slice) -> mx.array:
        return dequantize_arrays(
            _rows(packed, rows),
            _rows(scales, rows),
            None if biases is None else _rows(biases, rows),
            group_size=wanted.group_size,
            bits=wanted.bits,
            mode=wanted.mode,
        )

    return after


def signal_to_noise_db_between(weight: mx.array, changed: mx.array) -> float:
    """The same for two arrays of weights of one shape."""
    return _decibels(weight, lambda rows: _rows(changed, rows).astype(mx.float32))


def _decibels(weight: mx.array, after: Callable[[slice], mx.array], energy: mx.array | None = None) -> float:
    signal = noise = 0.0
    share: mx.array | float = 1.0 if energy is None else mx.sqrt(energy / mx.maximum(energy.max(), 1e-30))
    for rows in _row_chunks(weight):
        before = _rows(weight, rows).astype(mx.float32)
        largest = mx.abs(before).max()
        unit = mx.where(largest > 0, largest, 1)  # squares of very large or small weights leave float32's range
        power, error = mx.square(before / unit * share), mx.square((before - after(rows)) / unit * share)
        power, error = power.sum(), error.sum()
        mx.eval(power, error, unit)
        signal += number(power) * number(unit) ** 2
        noise += number(error) * number(unit) ** 2
    if noise == 0:
        return math.inf
    # The power of what is infinite or no number is infinite, however large the weights.
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def check_finite(plan: QuantizationPlan) -> dict[str, float]:
    """Look for NaN and infinite weights, layer by layer, before anything is changed.

    Returns:
        The largest magnitude among each layer's weights, by path.

    Raises:
        QuantizationError: There are some; the text names the layers.
    """
    broken, largest = [], {}
    for layer in plan.layers:
        weight = read_array(dense_twin(layer.module)["weight"])
        largest[layer.path] = largest_magnitude(weight)
        count = sum(int(number((~mx.isfinite(_rows(weight, rows))).sum())) for rows in _row_chunks(weight))
        if count:
            broken.append(f"{layer.path} ({count} of {layer.weights:,} weights)")
    if broken:
        more = f", and {len(broken) - 3} layers more" if len(broken) > 3 else ""
        raise QuantizationError(
            f"NaN or infinite weights in {', '.join(broken[:3])}{more}. Quantizing them would spread them over whole "
            "groups. Look at the training run or the file they come from; nothing was changed."
        )
    return largest


def check_backend(plan: QuantizationPlan) -> None:
    """Run each packed format that the plan uses once, on a few numbers.

    Raises:
        BackendError: This backend has no kernel for one.
    """
    for wanted in {layer.format for layer in plan.layers if layer.format is not None}:
        weight = mx.ones((wanted.group_size, 2 * wanted.group_size), dtype=mx.bfloat16)
        inputs = mx.ones((2, 2 * wanted.group_size), dtype=mx.bfloat16)  # one row alone has a kernel of its own
        try:
            packed, scales, *biases = mx.quantize(weight, wanted.group_size, wanted.bits, mode=wanted.mode)
            if wanted.quantize_input:
                y = mx.qqmm(inputs, packed, scales, wanted.group_size, wanted.bits, wanted.mode)
            else:
                y = dequantize_arrays(packed, scales, biases[0] if biases else None, **wanted.parts())
            mx.eval(y)
        except (RuntimeError, ValueError) as error:
            what = "quantize a layer's inputs" if wanted.quantize_input else "compute with packed weights"
            advice = "Leave activations=True out" if wanted.quantize_input else "Use mode='affine'"
            raise BackendError(
                f"MLX cannot {what} in mode {wanted.mode!r} on this backend ({mx.default_device()}): "
                f"{str(error).rstrip('.')}. {advice}."
            ) from error


def outcome_of(
    layer: LayerPlan,
    method: str,
    *,
    note: str | None = None,
    output_error: float | None = None,
    optimal_output_error: float | None = None,
) -> LayerOutcome:
    """The loss of a layer that is in the model already, against its original of the open transaction.

    Args:
        layer: A planned layer, quantized by now.
        method: The method that was used.
        note: Further remarks.
        output_error: As in `LayerOutcome`.
        optimal_output_error: As in `LayerOutcome`.
    """
    assert layer.format is not None
    now = layer.module
    weight = read_array(dense_twin(original(layer.model, layer.path))["weight"])
    snr = signal_to_noise_db(weight, (now["weight"], now["scales"], now.get("biases")), layer.format)
    return LayerOutcome(layer.path, method, snr, output_error, optimal_output_error, note)


def _hollow_copy(module: nn.Module, weight: mx.array) -> nn.Module:
    """The module with a weight of its shape that takes no memory, for its `to_quantized` to look at."""
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    for name, value in module.items():
        dict.__setitem__(twin, name, value)
    twin["weight"] = mx.zeros(weight.shape, dtype=weight.dtype)  # not evaluated, now or later
    assert own_arrays(twin)
    return twin


def _row_chunks(weight: mx.array) -> list[slice]:
    """Slices over the rows of all leading axes together."""
    rows = math.prod(weight.shape[:-1])
    at_once = _CHUNK_WEIGHTS if mx.default_device() == mx.Device(mx.cpu) else _CHUNK_WEIGHTS_GPU
    step = max(1, at_once // max(1, weight.shape[-1]))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _rows(array: mx.array, rows: slice) -> mx.array:
    return array.reshape(-1, array.shape[-1])[rows]
