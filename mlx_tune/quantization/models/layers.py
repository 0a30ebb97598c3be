"""Single layers: what their weights are, and their packed and unpacked twins."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_tune.errors import QuantizationError
from mlx_tune.quantization.formats.lazy_arrays import read_array
from mlx_tune.quantization.formats.modes import Format
from mlx_tune.quantization.formats.packing import PackedArrays, dequantize_float32
from mlx_tune.units import dtype_name
from mlx_tune.upstream import freeze_also, frozen, set_mode

#: Modules that tokens are looked up in, packed and not.
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)


def is_quantized(module: nn.Module) -> bool:
    """True where the module holds packed weights."""
    return "scales" in module and hasattr(module, "bits") and hasattr(module, "group_size")


def current_format(module: nn.Module) -> Format:
    """The format of a module that is quantized already."""
    quantize_input = isinstance(module, nn.QQLinear)
    return Format(module.bits, module.group_size, getattr(module, "mode", "affine"), quantize_input)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weights as numbers, packed or not."""
    shape = module["weight"].shape
    if is_quantized(module):
        return (*shape[:-1], module["scales"].shape[-1] * module.group_size)
    return tuple(shape)


def parameter_count(module: nn.Module, arrays: dict[str, mx.array]) -> int:
    """The number of unquantized parameters that the given ones of a module stand for, as mlx-lm counts them."""
    if not is_quantized(module):
        return sum(a.size for a in arrays.values())
    count = 0
    for name, array in arrays.items():
        if name == "weight":
            count += array.size * 32 // module.bits
        elif name not in ("scales", "biases", "global_scale"):
            count += array.size
    return count


def why_not_quantizable(module: nn.Module, mode: str) -> str | None:
    """None where the module can take packed weights of that mode, else the reason."""
    name = type(module).__name__
    if not callable(getattr(module, "to_quantized", None)):
        return f"{name} has no quantized form in MLX"
    weight = module.get("weight")
    if not isinstance(weight, mx.array):
        return f"{name} holds no weight of its own"
    if weight.ndim < 2:
        return f"its weight has {weight.ndim} axis, MLX packs two or more"
    if weight.dtype not in _FLOATS:
        return f"its weight is {dtype_name(weight.dtype)}, not a floating point number"
    if mode != "affine" and not takes_mode(module.to_quantized):
        return f"{name} can be quantized in mode 'affine' only"
    return None


def takes_mode(to_quantized: Callable[..., object]) -> bool:
    """True where a layer's `to_quantized` knows of modes; those that are older than modes do not."""
    accepted = inspect.signature(to_quantized).parameters
    return "mode" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())


def dequantized_weight(module: nn.Module, dtype: mx.Dtype = mx.float32, *, after: mx.array | None = None) -> mx.array:
    """The weights of a quantized module as numbers, not yet evaluated.

    They are reconstructed in float32 from the scales and biases as stored: doing it in bfloat16 rounds again, which
    would count as quantization error what is not.

    Args:
        module: Any module with packed weights.
        dtype: The dtype of the result.
        after: An array that is to be computed first. Without one MLX unpacks all layers of a model before it computes
            with the first, whatever its memory limit.
    """
    weight, scales, biases = module["weight"], module["scales"], module.get("biases")
    if after is not None:
        (weight,) = mx.depends([weight], [after])
    formats = current_format(module).keywords()
    global_scale = module.get("global_scale")
    if global_scale is not None:  # a stack of experts, each with a scale of its own
        experts = [
            mx.dequantize(w, s, global_scale=g, dtype=mx.float32, **formats)
            for w, s, g in zip(weight, scales, global_scale, strict=True)
        ]
        return mx.stack(experts).astype(dtype)
    return dequantize_float32(weight, scales, biases, **formats).astype(dtype)


def dense_twin(module: nn.Module, dtype: mx.Dtype | None = None, *, after: mx.array | None = None) -> Any:
    """An unquantized module that computes the same; its weights are a recipe that holds no memory yet.

    Args:
        module: A quantized module; any other is handed back as it is.
        dtype: Of the twin's weights; that of the scales by default, where they are floats.
        after: As for `dequantized_weight`.

    Raises:
        QuantizationError: The class has no unquantized counterpart that could be found.

    Examples:
        >>> twin = dense_twin(nn.Linear(64, 8).to_quantized())
        >>> type(twin).__name__, twin.weight.shape
        ('Linear', (8, 64))
    """
    if not is_quantized(module):
        return module
    dense_class = _dense_class(type(module))
    twin = dense_class.__new__(dense_class)
    nn.Module.__init__(twin)
    if dtype is None:
        dtype = module["scales"].dtype if "biases" in module else _float_dtype(module)
    for name, value in module.items():
        if name not in ("weight", "scales", "biases", "global_scale"):
            dict.__setitem__(twin, name, value)
    twin["weight"] = dequantized_weight(module, dtype, after=after)
    for name, value in vars(module).items():  # such as a fused layer's split points
        if name not in vars(twin) and name not in ("bits", "group_size", "mode", "biases", "global_scale"):
            vars(twin)[name] = value
    set_mode(twin, module.training)
    return twin


def read_weight(module: nn.Module, dtype: mx.Dtype | None = None) -> mx.array:
    """The weights of a layer as numbers, packed or not, evaluated; what the layer holds stays as it is.

    Args:
        module: The layer.
        dtype: Of the result, where the layer is quantized; that of its scales by default, where they are floats.
    """
    return read_array(dense_twin(module, dtype)["weight"])


def has_dense_class(quantized: type) -> bool:
    """True where `dense_twin` knows what to make of a class of quantized modules."""
    return find_dense_class(quantized) is not None


def _dense_class(quantized: type) -> type[nn.Module]:
    found = find_dense_class(quantized)
    if found is None:
        raise QuantizationError(
            f"{quantized.__name__} is quantized, and no unquantized class for it could be found beside it. "
            "Quantize the original model instead, or add its path to skip=."
        )
    return found


def find_dense_class(quantized: type) -> type[nn.Module] | None:
    """The class whose packed form a class of quantized modules is; None where there is none to be found."""
    for base in quantized.__mro__:
        if base in (nn.QuantizedLinear, nn.QQLinear):
            return nn.Linear
        if base is nn.QuantizedEmbedding:
            return nn.Embedding
        # mlx-lm names them alike and keeps them side by side: SwitchLinear and QuantizedSwitchLinear.
        candidate = getattr(sys.modules.get(base.__module__), base.__name__.replace("Quantized", ""), None)
        if "Quantized" in base.__name__ and isinstance(candidate, type) and issubclass(candidate, nn.Module):
            return candidate
    return None


def _float_dtype(module: nn.Module) -> mx.Dtype:
    bias = module.get("bias")
    return bias.dtype if isinstance(bias, mx.array) else mx.bfloat16


def quantized_module(module: nn.Module, wanted: Format, arrays: PackedArrays) -> nn.Module:
    """The quantized counterpart of a module around given arrays.

    Args:
        module: An unquantized module, or a quantized one that is quantized anew.
        wanted: The format of the arrays.
        arrays: Packed weights, scales and biases.

    Returns:
        A module of the class that MLX or mlx-lm use for it, with the module's own bias, training flag and frozen bias.
        Making it draws random numbers that nobody uses, as MLX's constructors do.

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
        set_mode(hollow, False)  # in training mode MLX's layer would keep, and use, unquantized weights
    made: nn.Module = hollow.to_quantized(**options)
    weight, scales, biases = arrays
    made["weight"], made["scales"] = weight, scales
    if biases is not None:
        made["biases"] = biases
    freeze_also(made, frozen(module) & set(made))
    if not wanted.quantize_input:
        set_mode(made, module.training)
    return made


def _hollow_copy(module: nn.Module, weight: mx.array) -> nn.Module:
    """The module with a weight of its shape that takes no memory, for its `to_quantized` to look at."""
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    for name, value in module.items():
        dict.__setitem__(twin, name, value)
    twin["weight"] = mx.zeros(weight.shape, dtype=weight.dtype)  # not evaluated, now or later
    return twin
