"""A model built from its configuration alone: its arrays have shapes and dtypes, and none is ever evaluated."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.capacity.configuration import Config
from mlx_tune.lm.capacity.quantization import quantize_unloaded
from mlx_tune.lm.loading import cast_parameters

if TYPE_CHECKING:
    import mlx.nn as nn

#: How architectures call the number of their blocks.
_BLOCK_COUNTS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
#: Attributes of blocks that number them, and do not tell kinds apart.
_NUMBERS = ("idx", "index", "layer_id", "layer_number", "layer_num")
#: Words in the names of settings that list blocks by their numbers.
_LISTS_BLOCKS = ("layer", "idx", "indices", "index")
#: The ends of names of settings that say for each block what it is.
_KINDS = ("_types", "_type", "_pattern", "_kinds")
_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Unloaded:
    """A configuration out of which models are built, whole or with fewer blocks.

    Attributes:
        config: The configuration.
        bits: Bits to quantize to; None for as the configuration says.
        group_size: Weights that share a scale; None for the mode's own.
        mode: The format of quantized weights.
    """

    config: Config
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"

    def completed(self, whole: nn.Module) -> Unloaded:
        """The same with what the architecture itself says of each block, where the configuration is silent."""
        inner: Config = self.config.get("text_config") or {}
        inside = any(name in inner for name in _BLOCK_COUNTS)
        settings = inner if inside else self.config
        found = {
            name: list(value)
            for part in (whole, whole.get("model"))
            if part is not None
            for name, value in {**vars(part), **part}.items()
            if name.endswith(_KINDS) and isinstance(value, list | tuple) and len(value) == len(whole.layers)
        }
        settings = {**settings, **{name: value for name, value in found.items() if not settings.get(name)}}
        return replace(self, config={**self.config, "text_config": settings} if inside else settings)

    def kinds(self, model: nn.Module, keep: Sequence[int] | None = None) -> list[Hashable]:
        """The kinds of the blocks of a model that `build` made, with the same `keep`."""
        return kinds_of(model, self.config if keep is None else shortened(self.config, keep))

    def build(self, keep: Sequence[int] | None = None) -> nn.Module:
        """The model.

        Args:
            keep: The blocks to build, by their number in the whole model; None for all.

        Raises:
            InvalidArgumentError: An architecture that the installed mlx-lm does not know, or a configuration that lacks
                a setting of it.
        """
        config = copy.deepcopy(dict(self.config))
        if keep is not None:
            config = shortened(config, keep)
        model = _built(config)
        cast_parameters(model, dtype_of(config))
        quantize_unloaded(model, config, self.bits, self.group_size, self.mode, keep)
        model.eval()
        return model


def dtype_of(config: Config) -> str:
    """The dtype in which a model's weights are stored; bfloat16 where the configuration does not say."""
    inner = config.get("text_config") or {}
    for settings in (config, inner):
        named = str(settings.get("torch_dtype") or settings.get("dtype") or "").rpartition(".")[2]
        if named in _DTYPES:
            return named
    return "bfloat16"


def _built(config: Config) -> nn.Module:
    import mlx_lm
    from mlx_lm.utils import _get_classes

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise InvalidArgumentError("The configuration names no model_type: it is not a language model's config.json.")
    try:
        model_class, arguments = _get_classes(config)
    except ValueError as error:
        raise InvalidArgumentError(
            f"model_type={kind!r}: mlx-lm {mlx_lm.__version__}, which is installed, does not know this architecture. "
            "Install a newer mlx-lm, or name a model of an architecture that it has."
        ) from error
    try:
        model: nn.Module = model_class(arguments.from_dict(config))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InvalidArgumentError(
            f"mlx-lm {mlx_lm.__version__} cannot build a {kind!r} from this configuration: {type(error).__name__}: "
            f"{error}. A setting is missing or of another kind."
        ) from error
    return model


def shortened(config: Config, keep: Sequence[int]) -> Config:
    """The configuration of a model that has only some of the blocks.

    Lists and texts with an entry for each block lose those of the others, and lists of blocks' numbers get new ones.

    Args:
        config: The whole model's.
        keep: The blocks that stay, in order.

    Examples:
        >>> shortened({"num_hidden_layers": 3, "layer_types": ["a", "b", "b"]}, [0, 1])
        {'num_hidden_layers': 2, 'layer_types': ['a', 'b']}
    """
    inner = config.get("text_config")
    if isinstance(inner, dict) and any(name in inner for name in _BLOCK_COUNTS):
        config = {**config, "text_config": shortened(inner, keep)}
    counts = [name for name in _BLOCK_COUNTS if isinstance(config.get(name), int)]
    if not counts:
        return config
    total, new_number = config[counts[0]], {old: new for new, old in enumerate(keep)}

    def changed(name: str, value: Any) -> object:
        if name in counts and value == total:
            return len(keep)
        if isinstance(value, str) and "pattern" in name and len(value) == total:
            return "".join(value[i] for i in keep)
        if isinstance(value, list) and len(value) == total:
            return [value[i] for i in keep]
        numbers = isinstance(value, list) and all(isinstance(i, int) and 0 <= i < total for i in value)
        if numbers and any(word in name for word in _LISTS_BLOCKS):
            return [new_number[i] for i in value if i in new_number]
        return value

    return {name: changed(name, value) for name, value in config.items()}


def kind_of(block: nn.Module) -> Hashable:
    """All that two blocks of the same kind have in common: classes, shapes, dtypes, flags, and what is trained."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(block.parameters())
    trained = {entry[0] for entry in tree_flatten(block.trainable_parameters())}
    arrays = tuple((path, array.shape, str(array.dtype), path in trained) for path, array in flat)
    flags = tuple(
        (path, type(module).__name__, name, value)
        for path, module in block.named_modules()
        for name, value in sorted({**vars(module), **module}.items())
        if isinstance(value, bool | int | float | str)
        and not isinstance(value, mx.array)
        and not name.startswith("_")
        and not any(word in name for word in _NUMBERS)
    )
    return arrays, flags


def kinds_of(model: nn.Module, config: Config) -> list[Hashable]:
    """The kind of each block: its own, and what the configuration says of it alone.

    Some architectures choose a block's mask by such a list, which the block itself does not hold.

    Args:
        model: The model.
        config: Its configuration, with as many blocks.
    """
    count = len(model.layers)
    inner = config.get("text_config")
    settings = [*config.items(), *(inner.items() if isinstance(inner, dict) else ())]
    lists = [
        (name, value)
        for name, value in settings
        if name.endswith(_KINDS) and isinstance(value, list) and len(value) == count
    ]
    return [
        (kind_of(block), tuple((name, str(value[i])) for name, value in lists)) for i, block in enumerate(model.layers)
    ]


def longest_context(config: Config) -> int:
    """The most tokens that a configuration allows in a row; very many where it does not say."""
    inner = config.get("text_config") or {}
    for settings in (config, inner):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "seq_length"):
            if isinstance(settings.get(name), int) and settings[name] > 0:
                return int(settings[name])
    return 1 << 30
