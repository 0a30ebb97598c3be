"""From mlx_lm.lora's settings to everything that a training run needs: model, adapters, optimizer, data, arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from mlx_tune.errors import InvalidArgumentError, MlxTuneError
from mlx_tune.lm.adapters import add_adapters, make_optimizer
from mlx_tune.lm.loading import load
from mlx_tune.units import whole_number

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx.optimizers import Optimizer
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tuner.trainer import TrainingArgs

#: How many blocks mlx-lm trains where nobody says.
MOST_LAYERS = 16


@dataclass(frozen=True)
class FineTuning:
    """A run that is ready to start.

    Attributes:
        model: The model, with its adapters, frozen as it is to be trained.
        tokenizer: Its tokenizer.
        optimizer: The optimizer, without state yet.
        train_set: mlx-lm's data set, or stand-in rows where no data was named.
        valid_set: The validation set, or None.
        test_set: The test set, or None.
        args: mlx-lm's `TrainingArgs`.
        settings: Every setting in mlx-lm's names, defaults filled in.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    optimizer: Optimizer
    train_set: object
    valid_set: object
    test_set: object
    args: TrainingArgs
    settings: dict[str, object]

    @property
    def plain_loss(self) -> bool:
        """True where mlx-lm's own loss was asked for, which holds the logits."""
        return bool(self.settings.get("plain_loss"))


def read_settings(given: Mapping[str, object], config: str | Path | None = None) -> dict[str, Any]:
    """Settings as `mlx_lm.lora` makes them: what was given, then the configuration file, then mlx-lm's defaults.

    Args:
        given: Settings by mlx-lm's names; None counts as not given.
        config: A YAML file.

    Returns:
        Every setting; `num_layers` is None where nobody said, since mlx-lm's 16 are more than some models have.

    Raises:
        InvalidArgumentError: The file is not there, or no YAML mapping.
    """
    import copy

    import yaml  # type: ignore[import-untyped]  # mlx-lm brings it; it has no types of its own
    from mlx_lm.lora import CONFIG_DEFAULTS, yaml_loader

    settings = {name: value for name, value in given.items() if value is not None}
    if config is not None:
        try:
            written = yaml.load(Path(config).read_text(encoding="utf-8"), yaml_loader)
        except OSError as error:
            raise InvalidArgumentError(
                f"The configuration file {str(config)!r} cannot be read: {error.strerror}."
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(f"The configuration file {str(config)!r} is not YAML: {error}.") from None
        if not isinstance(written, dict):
            raise InvalidArgumentError(f"The configuration file {str(config)!r} holds no settings.")
        settings = written | settings
    defaults: dict[str, object] = copy.deepcopy(CONFIG_DEFAULTS)
    return defaults | {"num_layers": None} | settings


def names_data(settings: Mapping[str, object]) -> bool:
    """True where somebody chose the data: mlx-lm's default is a download that nobody asked for."""
    from mlx_lm.lora import CONFIG_DEFAULTS

    return bool(settings.get("hf_dataset")) or settings["data"] != CONFIG_DEFAULTS["data"]


def prepare(
    settings: Mapping[str, Any], *, lazy: bool = False, stand_in_rows: int | None = None, adapters: bool = True
) -> FineTuning:
    """Load a model and data, and make everything ready as `mlx_lm.lora` does.

    Args:
        settings: The settings from `read_settings`.
        lazy: Leave the weights on disk until a step needs them.
        stand_in_rows: Use so many rows of `max_seq_length` tokens instead of the data set.
        adapters: Add adapters, or unfreeze what is to be trained.

    Returns:
        The needs of a run.

    Raises:
        MlxTuneError: The model or the data cannot be loaded; the text says why.
        InvalidArgumentError: A setting that cannot be meant.
    """
    import mlx.core as mx
    import numpy as np

    for name in ("batch_size", "iters", "max_seq_length", "grad_accumulation_steps"):
        whole_number(settings[name], name, least=1)
    np.random.seed(settings["seed"])
    model, tokenizer, config, _ = load(settings["model"], lazy=lazy, trust_remote_code=settings["trust_remote_code"])
    if stand_in_rows is not None:
        train_set: object = StandInRows(stand_in_rows, settings["max_seq_length"], _vocabulary(config))
        valid_set = test_set = None
    else:
        train_set, valid_set, test_set = _data(settings, tokenizer)
    mx.random.seed(settings["seed"])
    num_layers = settings["num_layers"]
    if num_layers is None:
        num_layers = min(MOST_LAYERS, len(model.layers))
    if adapters:
        add_adapters(
            model, settings["fine_tune_type"], num_layers=num_layers, lora_parameters=settings["lora_parameters"]
        )
        if settings["resume_adapter_file"] is not None:
            _resume(model, settings["resume_adapter_file"])
    rate = settings["learning_rate"]
    if settings["lr_schedule"]:
        from mlx_lm.tuner.utils import build_schedule

        rate = build_schedule(settings["lr_schedule"])
    own = (settings["optimizer_config"] or {}).get(settings["optimizer"].lower(), {})
    return FineTuning(
        model=model,
        tokenizer=tokenizer,
        optimizer=make_optimizer(settings["optimizer"], rate, own),
        train_set=train_set,
        valid_set=valid_set or None,
        test_set=test_set or None,
        args=_training_args(settings),
        settings={**settings, "num_layers": num_layers},
    )


class StandInRows(Sequence[tuple[list[int], int]]):
    """Rows of a given length, for asking what a model needs before there is data.

    Args:
        count: Rows.
        length: Tokens in each.
        vocabulary: Tokens are below this.
    """

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        """Note the sizes; rows are made when they are asked for."""
        self._count = count
        self._row = ([(7 * i) % vocabulary for i in range(length)], 0)

    def __len__(self) -> int:
        """The number of rows."""
        return self._count

    def __getitem__(self, index: Any) -> Any:
        """A row; they are all the same."""
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._row


def _vocabulary(config: Mapping[str, Any]) -> int:
    inner = config.get("text_config") or {}
    size = config.get("vocab_size") or inner.get("vocab_size")
    if size is None:
        raise MlxTuneError("The model's config.json names no vocab_size: give --data, so that rows come from text.")
    return int(size)


def _training_args(settings: Mapping[str, Any]) -> TrainingArgs:
    from mlx_lm.tuner.trainer import TrainingArgs

    return TrainingArgs(
        batch_size=settings["batch_size"],
        iters=settings["iters"],
        val_batches=settings["val_batches"],
        steps_per_report=settings["steps_per_report"],
        steps_per_eval=settings["steps_per_eval"],
        steps_per_save=settings["save_every"],
        max_seq_length=settings["max_seq_length"],
        adapter_file=Path(settings["adapter_path"]) / "adapters.safetensors",
        grad_checkpoint=bool(settings["grad_checkpoint"]),
        grad_accumulation_steps=settings["grad_accumulation_steps"],
        clear_cache_threshold=settings["clear_cache_threshold"],
    )


def _data(settings: Mapping[str, object], tokenizer: object) -> tuple[object, object, object]:
    from mlx_lm.tuner.datasets import load_dataset

    try:
        return cast(tuple[object, object, object], load_dataset(SimpleNamespace(**settings), tokenizer))
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"A file below {settings['data']!r} is not JSON lines: {error}.") from error
    except (ValueError, KeyError, TypeError, ImportError, OSError, ConnectionError) as error:
        hint = ""
        if not Path(str(settings["data"])).exists():
            hint = " There is no such folder here; a data set's name on the hub needs a network and `datasets`."
        raise MlxTuneError(
            f"The data {settings['data']!r} cannot be loaded: {type(error).__name__}: {error}.{hint}"
        ) from error


def _resume(model: nn.Module, file: str) -> None:
    try:
        model.load_weights(file, strict=False)
    except (RuntimeError, ValueError, OSError) as error:
        raise InvalidArgumentError(f"resume_adapter_file={file!r} cannot be loaded: {error}.") from error
