"""A model's configuration from wherever it is, and nothing else of the model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_tune.errors import InvalidArgumentError, MlxTuneError

#: The entries of a config.json.
Config = dict[str, Any]

_FILE = "config.json"


@dataclass(frozen=True)
class Described:
    """A model that is known by its configuration.

    Attributes:
        name: The name that people know it by: the folder's, or the hub's.
        config: The configuration.
        folder: Its folder, where it has one with weights in it; None elsewhere.
    """

    name: str
    config: Config
    folder: Path | None = None


def read_configuration(model: str | os.PathLike[str] | Config, revision: str | None = None) -> Described:
    """Read the configuration of a model; its weights are neither read nor fetched.

    Args:
        model: A model's folder, a `config.json` under whatever name, a name on the hub, of which this one file is
            fetched, or a dictionary with its entries.
        revision: The branch, tag or commit of a hub name.

    Raises:
        InvalidArgumentError: No such place, or no configuration in it.
        MlxTuneError: The hub cannot be reached, or does not give the file to everybody.
    """
    if isinstance(model, dict):
        return Described(str(model.get("model_type", "model")), dict(model))
    place, text = Path(model), os.fspath(model)
    if place.is_file() and place.name != _FILE:
        return Described(_name_of(place), _read(place))
    if place.is_file():
        place = place.parent
    if place.is_dir():
        if not (place / _FILE).is_file():
            raise InvalidArgumentError(f"{text!r} holds no {_FILE}: it is not a model's folder.")
        weights = any(place.glob("model*.safetensors"))
        return Described(place.resolve().name, _with_separate(_read(place / _FILE), place), place if weights else None)
    if place.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise InvalidArgumentError(f"{text!r} is no file or folder here, and no hub name such as 'owner/name'.")
    return Described(text.rpartition("/")[2], _read(_fetched(text, revision)))


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(name, _FILE, revision=revision))
    except GatedRepoError as error:
        raise MlxTuneError(
            f"{name!r} is gated: its owner gives its files to those who accepted a licence. Accept it on "
            f"huggingface.co/{name} and log in with `hf auth login`; or copy its {_FILE} here and give its path, which "
            "is all that is needed."
        ) from error
    except RepositoryNotFoundError as error:
        raise MlxTuneError(f"The hub has no model {name!r}, or hides it from those who are not logged in.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise MlxTuneError(
            f"There is no folder {name!r} here, and the hub could not be asked for its {_FILE} "
            f"({type(error).__name__}). Check the network, or give the path of a {_FILE}."
        ) from error
    except EntryNotFoundError as error:
        raise MlxTuneError(f"{name!r} has no {_FILE}: it is not a model that mlx-lm loads.") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise MlxTuneError(
            f"The hub did not give the {_FILE} of {name!r} ({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Check the name and the network, or give the path of a {_FILE}."
        ) from error


def _read(file: Path) -> Config:
    from mlx_lm.utils import _decode_tagged_floats

    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError(f"{str(file)!r} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InvalidArgumentError(f"{str(file)!r} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise InvalidArgumentError(f"{str(file)!r} holds no settings of a model.")
    decoded: Config = _decode_tagged_floats(config)
    return decoded


def _with_separate(config: Config, folder: Path) -> Config:
    """NVIDIA's exports keep what they say of quantization in a file of its own."""
    separate = folder / "hf_quant_config.json"
    if "quantization_config" not in config and separate.is_file():
        return {**config, "quantization_config": {"quant_method": "modelopt", **_read(separate)}}
    return config


def _name_of(file: Path) -> str:
    return file.resolve().parent.name if file.name == _FILE else file.stem
