"""Packing the weights of an unloaded model as its configuration says, or as is asked for."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.capacity.configuration import Config

if TYPE_CHECKING:
    import mlx.nn as nn

#: The formats of other tools that mlx-lm loads packed, as it maps them (mlx_lm/utils.py, load_model).
_PACKED: dict[str, Config] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "awq": {"group_size": 128, "bits": 4, "mode": "affine"},
    "gptq": {"group_size": 128, "bits": 4, "mode": "affine"},
    "modelopt": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


def stored_quantization(config: Config) -> Config | None:
    """The format in which a configuration's weights are packed once mlx-lm has loaded them; None where they are not.

    Args:
        config: The configuration. Formats that mlx-lm unpacks while loading, such as most of fp8, count as none.

    Raises:
        InvalidArgumentError: A format that mlx-lm does not load.
    """
    own = config.get("quantization")
    if isinstance(own, dict):
        return own
    other = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not isinstance(other, dict):
        return None
    method = other.get("quant_method")
    if method is None and "bits" in other and "group_size" in other:
        return other
    if method == "compressed-tensors":
        from mlx_lm.utils import _compressed_tensors_quantization

        try:
            found: Config = _compressed_tensors_quantization(other)
        except ValueError as error:
            raise InvalidArgumentError(f"The weights are packed in a way that mlx-lm does not load: {error}.") from None
        return found
    if method == "fp8" and other.get("scale_fmt") == "ue8m0" and list(other.get("weight_block_size") or ()) == [32, 32]:
        return _PACKED["mxfp8"]
    if method == "bitnet":
        return {"method": "bitnet", "config": other}
    packed = _PACKED.get(str(method))
    if packed is None:
        return None
    sized = {name: other[name] for name in ("group_size", "bits") if isinstance(other.get(name), int)}
    return packed | sized if method in ("awq", "gptq", "modelopt") else packed


def refuse_twice(config: Config, bits: int | None) -> None:
    """Refuse to quantize weights that are packed already.

    Raises:
        InvalidArgumentError: They are, and bits were given.
    """
    stored = stored_quantization(config)
    if stored is not None and bits is not None:
        held = f"{stored['bits']} bits" if "bits" in stored else str(stored.get("method"))
        raise InvalidArgumentError(
            f"bits={bits}: the configuration says that these weights are quantized already, to {held}. Leave bits out "
            "to ask about them as they are, or name the model that they were made from."
        )


def quantize_unloaded(
    model: nn.Module,
    config: Config,
    bits: int | None,
    group_size: int | None,
    mode: str,
    keep: Sequence[int] | None = None,
) -> None:
    """Pack a model's weights in place; nothing is evaluated.

    Args:
        model: The model, its arrays never evaluated.
        config: Its configuration.
        bits: Bits to quantize to, as `mlx_lm.convert -q` does; None for as the configuration says.
        group_size: Weights that share a scale.
        mode: mlx-lm's mode.
        keep: The blocks of a whole model that this one has: settings for single layers are found by it.

    Raises:
        InvalidArgumentError: Bits that MLX does not have, or a model that is packed already.
    """
    import mlx.nn as nn
    from mlx_lm.utils import quantize_model

    if bits is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
            try:
                quantize_model(model, config, group_size, bits, mode)
            except (ValueError, KeyError) as error:
                raise InvalidArgumentError(
                    f"bits={bits}, group_size={group_size}, mode={mode!r}: MLX cannot quantize so: {error}."
                ) from None
        return
    stored = stored_quantization(config)
    if stored is None:
        return
    if stored.get("method") == "bitnet":
        from mlx_lm.models.bitlinear_layers import bitnet_quantize

        bitnet_quantize(model, stored["config"])
        return
    predicate = getattr(model, "quant_predicate", None)

    def packed(path: str, module: Any) -> bool | Config:
        own = stored.get(_whole_path(path, keep))
        if own is not None:
            return cast("bool | Config", own)
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % stored["group_size"]:
            return False
        return True if predicate is None else cast("bool | Config", predicate(path, module))

    nn.quantize(model, stored["group_size"], stored["bits"], mode=stored.get("mode", "affine"), class_predicate=packed)


def _whole_path(path: str, keep: Sequence[int] | None) -> str:
    """The path that a layer of a shorter model has in the whole one."""
    if keep is None:
        return path
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is not None and int(parts[at]) < len(keep):
        parts[at] = str(keep[int(parts[at])])
    return ".".join(parts)
