"""Writing a quantized model so that stock `mlx_lm.load` reads it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_tune.errors import InvalidArgumentError, MlxTuneError
from mlx_tune.files.scratch import writing
from mlx_tune.files.unfinished import beside
from mlx_tune.quantization.planning.config import keeps_inputs, quantization_config, quantizes_inputs
from mlx_tune.state import same_random_stream
from mlx_tune.trees import nbytes_of
from mlx_tune.units import format_names

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper


def save_quantized(
    path: str | os.PathLike[str],
    model: nn.Module,
    tokenizer: TokenizerWrapper | None = None,
    config: Mapping[str, object] | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
) -> Path:
    """Save a quantized model as a folder that stock `mlx_lm.load` reads.

    The weights, sharded as mlx-lm shards them, `config.json` with the `quantization` block that belongs to the
    model as it is (read off its layers, so mixed widths and layers left alone are in it), the tokenizer, and the
    model card that mlx-lm writes. The folder appears whole or not at all: everything is written beside it first,
    loaded lazily by mlx-lm to see that it can be, and then renamed.

    Args:
        path: The folder to make. One that is there already must be empty.
        model: The quantized model.
        tokenizer: mlx-lm's or transformers'; None copies the tokenizer's files from `source`.
        config: The model's configuration as `mlx_lm.load(..., return_config=True)` gives it; None reads
            `config.json` in `source`. Its quantization block, if any, is replaced.
        source: The folder that the model was loaded from. Python files and `generation_config.json` in it are
            copied too, as custom architectures need them.

    Returns:
        The folder.

    Raises:
        InvalidArgumentError: Neither a configuration nor a folder to read it from, nothing quantized in the
            model, a folder that is not empty, or layers of which some quantize their inputs and others do not.
        MlxTuneError: mlx-lm cannot load what was written: adapters that are not fused, or another model's
            configuration. No file is left behind.
        DiskError: The disk has too little room, or the system refuses to write. Nothing is left behind.

    Examples:
        ```python
        model, tokenizer, config = mlx_lm.load("model/", return_config=True)
        mt.quantize_model(model, 4, 64)
        lm.save_quantized("model-4bit/", model, tokenizer, config)
        ```
    """
    from mlx_lm.utils import load_config, save_model

    target = Path(path)
    folder = None if source is None else Path(source)
    if config is None:
        if folder is None:
            raise InvalidArgumentError("save_quantized needs config=, or source= with a config.json to read it from.")
        config = load_config(folder)
    if tokenizer is None and folder is None:
        raise InvalidArgumentError("save_quantized needs tokenizer=, or source= to copy the tokenizer's files from.")
    check_new(target)
    described = describe(model, config)
    size = nbytes_of(model.parameters())
    with beside(target, instead=target) as made:
        with writing(target.parent, "The model", needed_bytes=size, way_out="Save it to a folder on a larger disk."):
            save_model(made, model)
            write_companions(made, described, tokenizer, folder)
        put_in_place(made, described, target)
    return target


def check_new(target: Path) -> None:
    """See that a folder may be made at a place.

    Raises:
        InvalidArgumentError: Something is there already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidArgumentError(f"{str(target)!r} is there already and not empty: give a new folder.")


def write_companions(
    made: Path, described: dict[str, object], tokenizer: TokenizerWrapper | None, source: Path | None
) -> None:
    """Write what belongs to a model beside its weights.

    Args:
        made: The folder.
        described: Its configuration.
        tokenizer: Its tokenizer; None copies the files of the source's.
        source: The folder that it was loaded from.
    """
    from mlx_lm.utils import create_model_card, save_config

    save_config(described, made / "config.json", keep_vision_config="vision_config" in described)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(made))
    if source is not None:
        _copy_companions(source, made, with_tokenizer=tokenizer is None)
    create_model_card(made, None)  # with a name it would fetch that model's own from the hub


def put_in_place(made: Path, described: dict[str, object], target: Path) -> None:
    """Move a folder to its place once mlx-lm has loaded it.

    Raises:
        MlxTuneError: mlx-lm cannot.
    """
    _check_loads(made, described)
    made.chmod(0o755)  # a temporary folder is private, a model is not
    if target.exists():
        target.rmdir()
    made.rename(target)


def describe(model: nn.Module, config: Mapping[str, object]) -> dict[str, object]:
    """The configuration with what belongs to the model as it is quantized now."""
    described = copy.deepcopy(dict(config))
    described["quantization"] = quantization_config(model)
    if not described["quantization"]:
        raise InvalidArgumentError(
            "Nothing in the model is quantized: call mlx_tune.quantize_model first, or save it with mlx_lm.utils.save."
        )
    described.pop("quantize_activations", None)
    if quantizes_inputs(model):
        described["quantize_activations"] = True
        others = keeps_inputs(model)
        if others:
            raise InvalidArgumentError(
                f"Some layers quantize their inputs, {format_names(others, most=3)} do not: mlx-lm's config.json says "
                "it of all packed Linear layers or of none. Quantize the model with these layers in skip=, or without "
                "activations=True."
            )
    return described


def _check_loads(folder: Path, described: dict[str, object]) -> None:
    """Let mlx-lm load what was written, its weights left on disk."""
    from mlx_lm.utils import load_model

    if described.get("model_file") is not None:
        return  # a program that comes with the model, and is not run without being asked for
    with same_random_stream():
        try:
            load_model(folder, lazy=True)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:400].rstrip('.')}"
            advice = "Does config= belong to this model?"
            if "lora_" in text:
                advice = "The model has adapters: fuse them into its layers first, as mlx_lm.fuse does."
            raise MlxTuneError(f"mlx-lm cannot load the model as it was to be saved: {text}. {advice}") from error


#: What a tokenizer is made of, in any of the formats that transformers reads.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)


def _copy_companions(source: Path, target: Path, *, with_tokenizer: bool) -> None:
    patterns = ["*.py", "generation_config.json", *(_TOKENIZER_FILES if with_tokenizer else ())]
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copy(file, target)
