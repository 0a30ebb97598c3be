"""Loading a model from a folder or a hub name, with errors that say what is missing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_tune.errors import InvalidArgumentError, MlxTuneError

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def load(
    model: str | os.PathLike[str],
    *,
    tokenizer_config: Mapping[str, object] | None = None,
    model_config: Mapping[str, object] | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    lazy: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify_kernels: bool = True,
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any], Path]:
    """Load what `mlx_lm.load` loads, and unpack quantized layers that MLX would compute wrong on this machine.

    Arguments are those of `mlx_lm.load`; what it returns with `return_config=True` comes back, and the folder.

    Args:
        model: A folder, or a name such as "mlx-community/Qwen3-0.6B-4bit", which needs a network or a filled cache.
        tokenizer_config: Further arguments for the tokenizer.
        model_config: Entries that replace those of the model's configuration.
        adapter_path: A folder with adapters to put on.
        lazy: Leave the weights on disk until they are used.
        revision: The branch, tag or commit of a hub name.
        trust_remote_code: Run Python files that come with the model, as `mlx_lm.load` does.
        verify_kernels: Multiply once with each distinct kind of packed weights that the model has. Layers that come
            out wrong, or for which this backend has no kernel, are unpacked and take more memory; a warning says
            which and why.

    Returns:
        The model, its tokenizer, its configuration and the folder that it was read from.

    Raises:
        InvalidArgumentError: A folder without a model in it.
        MlxTuneError: A hub name, and no way to reach the hub; or a folder that mlx-lm cannot load, such as one of an
            architecture that it does not know.

    Examples:
        ```python
        model, tokenizer, config, folder = lm.load("models/mine")
        ```
    """
    import mlx_lm

    folder = _folder(model, revision)
    if not (folder / "config.json").is_file():
        raise InvalidArgumentError(f"{str(folder)!r} holds no config.json: it is not a model's folder.")
    if not any(folder.glob("model*.safetensors")):
        raise InvalidArgumentError(f"{str(folder)!r} holds no model*.safetensors: its weights are missing.")
    try:
        loaded, tokenizer, config = mlx_lm.load(
            str(folder),
            lazy=lazy,
            return_config=True,
            tokenizer_config={"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
            model_config=dict(model_config or {}),
            adapter_path=None if adapter_path is None else str(adapter_path),
            trust_remote_code=trust_remote_code,
        )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise MlxTuneError(f"mlx-lm cannot load {str(folder)!r}: {type(error).__name__}: {error}") from error
    if verify_kernels:
        from mlx_tune.quantization.planning.faulty_kernels import unpack_faulty

        for note in unpack_faulty(loaded, evaluate=not lazy):
            warnings.warn(note, stacklevel=2)
    return loaded, tokenizer, config, folder


def cast_parameters(model: nn.Module, dtype: str) -> None:
    """Turn a model's floating-point parameters into another dtype, as `mlx_lm.convert --dtype` does.

    Args:
        model: A model of mlx-lm; parameters that its `cast_predicate` names stay as they are.
        dtype: "float16", "bfloat16" or "float32".
    """
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    may_cast = getattr(model, "cast_predicate", lambda path: True)

    def changed(path: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(getattr(mx, dtype)) if floating and may_cast(path) else value

    model.update(tree_map_with_path(changed, model.parameters()))


def _folder(model: str | os.PathLike[str], revision: str | None) -> Path:
    place = Path(model)
    if place.is_dir():
        return place
    name = str(model)
    # A hub name is "owner/name"; anything else can only be meant as a path.
    if place.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise InvalidArgumentError(
            f"There is no folder {name!r}, and it is not a hub name such as 'owner/name' either."
        )
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from mlx_lm.utils import _download

    try:
        return Path(_download(name, revision=revision))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise MlxTuneError(
            f"There is no folder {name!r} here, and the hub could not be asked for a model of that name "
            f"({type(error).__name__}). Check the network, or give the path of a folder."
        ) from error
