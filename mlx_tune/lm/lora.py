"""The parts of `mlx_lm.lora` that `mlx-tune lora` takes over: its options, its reporting, its test."""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mlx_tune.errors import InvalidArgumentError
from mlx_tune.lm.preparation import FineTuning

if TYPE_CHECKING:
    from mlx_lm.tuner.callbacks import TrainingCallback


def lora_parser(prog: str, *, without: Container[str] = ()) -> argparse.ArgumentParser:
    """The parser of `mlx_lm.lora`.

    Args:
        prog: The name of the command in its usage and errors.
        without: Options to leave out, because the command has its own by that name.
    """
    from mlx_lm.lora import build_parser

    parser: argparse.ArgumentParser = build_parser()
    parser.prog = prog
    parser.allow_abbrev = False
    for action in [action for action in parser._actions if any(name in without for name in action.option_strings)]:
        parser._handle_conflict_resolve(None, [(name, action) for name in action.option_strings])  # type: ignore[arg-type]
    return parser


def reporting_callback(settings: Mapping[str, object]) -> TrainingCallback | None:
    """The callback that `report_to` names, as `mlx_lm.lora` makes it; None where it names none.

    Raises:
        InvalidArgumentError: A service that mlx-lm does not know, or that is not installed.
    """
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        return get_reporting_callbacks(
            settings["report_to"],
            project_name=settings["project_name"],
            log_dir=settings["adapter_path"],
            config=dict(settings),
        )
    except (ValueError, ImportError) as error:
        raise InvalidArgumentError(f"report_to={settings['report_to']!r}: {error}") from error


def check_reporting(settings: Mapping[str, Any]) -> None:
    """See that `report_to` names what mlx-lm can report to, before anything is measured or trained.

    Raises:
        InvalidArgumentError: It does not.
    """
    from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK

    names = [name.strip().lower() for name in (settings["report_to"] or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in SUPPORT_CALLBACK]
    if unknown:
        raise InvalidArgumentError(
            f"report_to={settings['report_to']!r}: mlx-lm reports to {' and '.join(SUPPORT_CALLBACK)}, not to "
            f"{unknown[0]!r}."
        )


def test_loss(ready: FineTuning, batch_size: int, *, trained: bool) -> float:
    """The loss on the test set, by mlx-lm's own evaluation.

    Args:
        ready: The run.
        batch_size: Rows in a batch, all ranks together; fewer where the test set has fewer.
        trained: True where the model has just been trained; adapters are loaded from their folder where not.

    Returns:
        Mean loss, in nats a token.

    Raises:
        InvalidArgumentError: No test set, no adapters in their folder, or ones of another model.
    """
    import mlx.core as mx
    from mlx_lm.tuner.trainer import evaluate
    from mlx_lm.tuner.utils import load_adapters

    from mlx_tune.lm.losses.next_token import choose_loss
    from mlx_tune.lm.steps import as_rows, largest_batch

    settings = SimpleNamespace(**ready.settings)
    if ready.test_set is None:
        raise InvalidArgumentError(f"There is nothing to test on: {settings.data!r} has no test.jsonl.")
    if not trained and settings.adapter_path != "":
        try:
            load_adapters(ready.model, settings.adapter_path)
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"adapter_path={settings.adapter_path!r} cannot be loaded: {error}. To test the model without "
                'adapters, give --adapter-path "".'
            ) from error
    rows = as_rows(ready.test_set)
    most = largest_batch(rows, None, int(mx.distributed.init().size()))
    loss = evaluate(
        model=ready.model,
        dataset=rows,
        batch_size=min(batch_size, most),
        num_batches=settings.test_batches,
        max_seq_length=settings.max_seq_length,
        loss=choose_loss(ready.model, plain=ready.plain_loss).function,
    )
    return float(loss)
